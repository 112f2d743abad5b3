# The micro-guest: what a stock kernel does in its first seconds, one kind of thing per step.
#
# Each step starts at its entry of the table below in 64-bit mode, ring 0, interrupts off, with
#   rdi = a page of zeroes, rsi = rdi + 0x800, rsp = top of a stack, r14 = r15 = 0
# and ends at `passed` or `wrong`, which tell the host by OUT. An exception that a step did not ask for is told by OUT as well.
# The code may lie anywhere; the host fills GDT, IDT, TSS and page tables.

    .pushsection .rodata.smsvmm_microguest, "a"
    .irp name, code, stubs, breakpoint, undefined, page_fault, steps, end
    .globl smsvmm_microguest_\name
    .hidden smsvmm_microguest_\name
    .endr

    .balign 16
smsvmm_microguest_code:

passed:
    xor eax, eax
    out 0x10, al
    hlt
wrong:
    mov al, 1
    out 0x10, al
    hlt

# An exception nobody asked for: its vector goes to port 0x11.
unexpected:
    pop rax
    out 0x11, al
    hlt

# One stub of 8 bytes per vector.
    .balign 8
smsvmm_microguest_stubs:
    .set vector, 0
    .rept 32
    .balign 8
    push vector
    jmp unexpected
    .set vector, vector + 1
    .endr

# Breakpoint: counts in r14 and goes on after the int3.
smsvmm_microguest_breakpoint:
    inc r14
    iretq

# Undefined opcode: if r15 says where to go on, goes there.
smsvmm_microguest_undefined:
    test r15, r15
    jz 2f
    mov [rsp], r15
    inc r14
    iretq
2:  push 6
    jmp unexpected

# Page fault: the same; the address that faulted is left in r13.
smsvmm_microguest_page_fault:
    test r15, r15
    jz 2f
    mov r13, cr2
    add rsp, 8
    mov [rsp], r15
    inc r14
    iretq
2:  push 14
    jmp unexpected

step_basics:
    mov rax, 0x1122334455667788
    push rax
    call 2f
    pop rcx
    cmp rax, rcx
    jne wrong
    bsr rdx, rax
    cmp edx, 60
    jne wrong
    xor edx, edx
    mov ecx, 10
    div rcx
    imul rax, rax, 10
    add rax, rdx
    mov rcx, 0x1122334455667788
    cmp rax, rcx
    jne wrong
    bswap rax
    cmp eax, 0x44332211
    jne wrong
    shld rax, rcx, 8
    cmp al, 0x11
    jne wrong
    pushfq
    pop rax
    push rax
    popfq
    mov byte ptr [rdi], 7
    movzx ecx, byte ptr [rdi]
    cmp ecx, 7
    jne wrong
    jmp passed
2:  ret

step_locked:
    mov qword ptr [rdi], 5
    mov eax, 5
    mov ecx, 9
    lock cmpxchg qword ptr [rdi], rcx
    jnz wrong
    mov edx, 1
    lock xadd qword ptr [rdi], rdx
    cmp rdx, 9
    jne wrong
    lock inc dword ptr [rdi]
    lock or dword ptr [rdi], 0x40
    lock bts qword ptr [rdi], 40
    mov rax, [rdi]
    mov rcx, 0x1000000004b
    cmp rax, rcx
    jne wrong
    xchg [rdi], rcx
    lock dec qword ptr [rdi]
    jmp passed

step_cmpxchg16b:
    mov qword ptr [rdi], 1
    mov qword ptr [rdi + 8], 2
    mov eax, 1
    mov edx, 2
    mov ebx, 3
    mov ecx, 4
    lock cmpxchg16b [rdi]
    jnz wrong
    cmp qword ptr [rdi], 3
    jne wrong
    cmp qword ptr [rdi + 8], 4
    jne wrong
    lock cmpxchg16b [rdi]
    jz wrong
    cmp eax, 3
    jne wrong
    jmp passed

step_strings:
    mov r8, rdi
    mov r9, rsi
    cld
    mov al, 0x5a
    mov rdi, r9
    mov ecx, 300
    rep stosb
    mov rdi, r8
    mov rsi, r9
    mov ecx, 300
    rep movsb
    mov rdi, r8
    mov rsi, r9
    mov ecx, 300
    repe cmpsb
    jne wrong
    mov rdi, r9
    mov ecx, 32
    mov rax, 0x0102030405060708
    rep stosq
    cmp [r9 + 248], rax
    jne wrong
    jmp passed

step_sse:
    mov rax, 0x0000000200000001
    movq xmm0, rax
    punpcklqdq xmm0, xmm0
    movdqa xmm1, xmm0
    paddd xmm1, xmm0
    movaps [rdi], xmm1
    movups xmm2, [rdi]
    movq rcx, xmm2
    add rax, rax
    cmp rax, rcx
    jne wrong
    cvtsi2sd xmm3, eax
    ldmxcsr [rsi + 16]
    stmxcsr [rsi + 16]
    jmp passed

step_fxsave:
    mov rax, 0x1234567890
    movq xmm5, rax
    fninit
    fxsave64 [rdi]
    pxor xmm5, xmm5
    fxrstor64 [rdi]
    movq rcx, xmm5
    cmp rax, rcx
    jne wrong
    jmp passed

step_xsave:
    xor ecx, ecx
    xgetbv
    mov eax, 3
    xor edx, edx
    xsetbv
    mov r8, 0x1234567890
    movq xmm5, r8
    xsave64 [rdi]
    pxor xmm5, xmm5
    mov eax, 3
    xor edx, edx
    xrstor64 [rdi]
    movq rcx, xmm5
    cmp r8, rcx
    jne wrong
    jmp passed

step_int3:
    int3
    cmp r14, 1
    jne wrong
    jmp passed

step_ud2:
    lea r15, [rip + 2f]
    ud2
    jmp wrong
2:  cmp r14, 1
    jne wrong
    jmp passed

step_page_fault:
    lea r15, [rip + 2f]
    mov eax, [0x30000]
    jmp wrong
2:  cmp r13, 0x30000
    jne wrong
    jmp passed

step_msr:
    mov ecx, 0xc0000080
    rdmsr
    test eax, 0x400
    jz wrong
    wrmsr
    mov ecx, 0xc0000102
    mov eax, 0x12345678
    mov edx, 0xffff8880
    wrmsr
    swapgs
    mov ecx, 0xc0000101
    rdmsr
    cmp eax, 0x12345678
    jne wrong
    cmp edx, 0xffff8880
    jne wrong
    swapgs
    jmp passed

step_syscall:
    mov ecx, 0xc0000081
    xor eax, eax
    mov edx, 0x00180008
    wrmsr
    mov ecx, 0xc0000082
    lea rax, [rip + 2f]
    mov rdx, rax
    shr rdx, 32
    wrmsr
    mov ecx, 0xc0000084
    mov eax, 0x47700
    xor edx, edx
    wrmsr
    mov ecx, 0x10000
    mov r11d, 2
    sysretq
2:  cmp rcx, 0x10002
    jne wrong
    mov ax, cs
    cmp ax, 8
    jne wrong
    jmp passed

step_control:
    mov rax, cr3
    mov cr3, rax
    invlpg [rdi]
    mov rax, cr4
    mov rcx, rax
    or rcx, 0x80
    mov cr4, rcx
    mov cr4, rax
    mov rax, cr0
    mov rcx, rax
    or rcx, 8
    mov cr0, rcx
    clts
    mov rax, cr0
    test al, 8
    jnz wrong
    sgdt [rdi]
    lgdt [rdi]
    sidt [rdi]
    lidt [rdi]
    str eax
    cmp ax, 0x30
    jne wrong
    push 8
    lea rax, [rip + 2f]
    push rax
    retfq
2:  mov eax, 0x10
    mov ss, eax
    xor eax, eax
    mov ds, eax
    mov fs, eax
    mov rax, dr7
    mov dr7, rax
    jmp passed

step_identify:
    xor eax, eax
    xor ecx, ecx
    cpuid
    test eax, eax
    jz wrong
    rdtsc
    mov r8d, eax
    mov r9d, edx
    rdtsc
    shl rdx, 32
    or rax, rdx
    shl r9, 32
    or r8, r9
    cmp rax, r8
    jb wrong
    jmp passed

step_fences:
    lfence
    mfence
    sfence
    pause
    clflush [rdi]
    prefetcht0 [rdi]
    nop dword ptr [rax + rax]
    sti
    nop
    cli
    jmp passed

step_popcnt:
    mov eax, 0xf0f0
    popcnt ecx, eax
    cmp ecx, 8
    jne wrong
    jmp passed

    .balign 4
# Offsets of the steps, in the order of the host's list.
smsvmm_microguest_steps:
    .long step_basics - smsvmm_microguest_code
    .long step_locked - smsvmm_microguest_code
    .long step_cmpxchg16b - smsvmm_microguest_code
    .long step_strings - smsvmm_microguest_code
    .long step_sse - smsvmm_microguest_code
    .long step_fxsave - smsvmm_microguest_code
    .long step_xsave - smsvmm_microguest_code
    .long step_int3 - smsvmm_microguest_code
    .long step_ud2 - smsvmm_microguest_code
    .long step_page_fault - smsvmm_microguest_code
    .long step_msr - smsvmm_microguest_code
    .long step_syscall - smsvmm_microguest_code
    .long step_control - smsvmm_microguest_code
    .long step_identify - smsvmm_microguest_code
    .long step_fences - smsvmm_microguest_code
    .long step_popcnt - smsvmm_microguest_code
smsvmm_microguest_end:
    .popsection
