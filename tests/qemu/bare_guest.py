"""Guests of a few instructions: assembled with GNU as, loaded by QEMU as multiboot kernels.

A program begins at ``main`` with flat segments, an IDT, and the stack at 3 MiB. It has

    hex    prints RAX (EAX) as a line of hexadecimal digits on the debug console; keeps all registers
    done   ends QEMU
    R12 (``resume`` in 32-bit programs)   where #UD and #GP go on; R13 (``vector``) is the vector then,
                                          R14 (``seen_rcx``) RCX as the handler found it

A 64-bit program may define the handlers ``irq40`` and ``irq41`` of those two vectors.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_HEADER = """
    .text
    .code32
    .set BASE, 0x100000
header:
    .long 0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000)
    .long header, BASE, 0, 0, start
    .globl start
start:
    cli
    mov $0xff, %al      /* the firmware's timer goes on, and its interrupts have no handler here */
    outb %al, $0x21
    outb %al, $0xa1
    mov $0x200000, %esp
"""

_HEX = """
hex:
    push {a}
    push {c}
    push {d}
    mov {a}, {d}
    mov ${digits}, %ecx
1:  rol $4, {d}
    mov %edx, %eax
    and $15, %eax
    cmp $10, %al
    jb 2f
    add $39, %al
2:  add $48, %al
    outb %al, $0xe9
    loop 1b
    mov $10, %al
    outb %al, $0xe9
    pop {d}
    pop {c}
    pop {a}
    ret
done:
    outb %al, $0xf4
    hlt
    jmp done
"""

_LONG = (
    _HEADER
    + """
    /* identity map of 4 GiB in 2 MiB pages: PML4, PDPT, four page directories from 0x201000 on */
    mov $0x201000, %edi
    xor %eax, %eax
    mov $(6 * 1024), %ecx
    rep stosl
    movl $0x202007, 0x201000
    movl $0x203007, 0x202000
    movl $0x204007, 0x202008
    movl $0x205007, 0x202010
    movl $0x206007, 0x202018
    mov $0x203000, %edi
    mov $0x87, %eax
    mov $2048, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov $0x201000, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt gdtr
    ljmp $8, $enter
    .align 8
    /* 8: 64-bit code, 16: data, 24: 32-bit code, 32: data, user, 40: 64-bit code, user, 48: TSS */
gdt: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cf9a000000ffff
     .quad 0x00cff2000000ffff, 0x00affa000000ffff
tss_descriptor: .quad 0x0000890000000067, 0
gdtr: .word . - gdt - 1
    .long gdt
    .align 16
tss: .skip 4
    .quad 0x2f0000
    .skip 92
    .code64
enter:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x300000, %rsp
    lea tss(%rip), %rax
    mov %ax, tss_descriptor + 2
    shr $16, %eax
    mov %al, tss_descriptor + 4
    mov %ah, tss_descriptor + 7
    mov $48, %eax
    ltr %ax
    mov $fault6, %rax
    mov $6, %ecx
    call gate
    mov $fault13, %rax
    mov $13, %ecx
    call gate
    mov $irq40, %rax
    mov $0x40, %ecx
    call gate
    mov $irq41, %rax
    mov $0x41, %ecx
    call gate
    lidt idtr(%rip)
    jmp main
gate:
    mov $idt, %rdi
    shl $4, %rcx
    add %rcx, %rdi
    mov %ax, (%rdi)
    movw $8, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shr $16, %rax
    mov %ax, 6(%rdi)
    ret
fault6:
    mov $6, %r13
    jmp 1f
fault13:
    add $8, %rsp
    mov $13, %r13
1:  mov %rcx, %r14
    mov %r12, (%rsp)
    movq $8, 8(%rsp)
    movq $16, 32(%rsp)
    iretq
    .align 16
idtr: .word 0xfff
    .quad idt
    .align 16
idt: .skip 4096
"""
    + _HEX.format(a="%rax", c="%rcx", d="%rdx", digits=16)
)

_PROTECTED = (
    _HEADER
    + """
    lgdt gdtr
    ljmp $8, $enter
    .align 8
    /* 8: code, 16: data, 24: code whose base is 0x777 */
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00cf9a000777ffff
gdtr: .word . - gdt - 1
    .long gdt
enter:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x300000, %esp
    mov $fault6, %eax
    mov $6, %ecx
    call gate
    mov $fault13, %eax
    mov $13, %ecx
    call gate
    lidt idtr
    jmp main
gate:
    lea idt(, %ecx, 8), %edi
    mov %ax, (%edi)
    movw $8, 2(%edi)
    movw $0x8e00, 4(%edi)
    shr $16, %eax
    mov %ax, 6(%edi)
    ret
fault6:
    movl $6, vector
    jmp 1f
fault13:
    add $4, %esp
    movl $13, vector
1:  mov %ecx, seen_rcx
    push %eax
    mov resume, %eax
    mov %eax, 4(%esp)
    pop %eax
    iretl
vector: .long 0
seen_rcx: .long 0
resume: .long 0
    .align 16
idtr: .word 0x7ff
    .long idt
    .align 16
idt: .skip 2048
"""
    + _HEX.format(a="%eax", c="%ecx", d="%edx", digits=8)
)


def _assemble(directory: Path, source: str, machine: str) -> Path:
    text, code, image = directory / "guest.s", directory / "guest.o", directory / "guest.bin"
    text.write_text(source)
    subprocess.run(["as", f"--{machine}", "-o", code, text], check=True)
    emulation = {"64": "elf_x86_64", "32": "elf_i386"}[machine]
    link = f"ld -m {emulation} -Ttext=0x100000 --oformat binary -e start".split()
    subprocess.run([*link, "-o", image, code], check=True)
    return image


def long_mode_guest(directory: Path, program: str) -> Path:
    """An image of a 64-bit program."""
    handlers = [f"{name}: iretq\n" for name in ("irq40", "irq41") if f"{name}:" not in program]
    return _assemble(directory, _LONG + "".join(handlers) + program, "64")


def protected_mode_guest(directory: Path, program: str) -> Path:
    """An image of a 32-bit program without paging."""
    return _assemble(directory, _PROTECTED + program, "32")
