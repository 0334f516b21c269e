# A 32-bit program without a C library: pause() for ever.
    .globl _start
_start:
    mov $29, %eax
    int $0x80
    jmp _start
    .section .note.GNU-stack, "", @progbits
