/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The gateway without QEMU: a program that loads it with the arguments given (after the number of vCPUs), and runs
 * instructions as its standard input says. One thread a vCPU; numbers are hexadecimal but for vCPUs and counts.
 *
 *   run V KIND LONG CPL PC rax rbx rcx rdx rsi rdi r8 rsp
 *        -> done V stepped|native|fault PC rax rbx rcx rdx TIMES      KIND: bytes of the instruction
 *        An instruction that is held is retried for ever; `run` for a vCPU that retries interrupts it there.
 *   abandon V             -> abandoned V          the vCPU stops to retry, as a reset makes it
 *   storm V COUNT         -> stormed V SUM        COUNT RDMSRs one after the other; the sum of their results
 *   translate LONG CPL PC VADDR BYTES...  -> translated NAME...     what is called back, an instruction each
 *   deliver V VECTOR      -> delivered V N        an interrupt; N are in service afterwards
 *   deaf V                -> deaf V               no MSI reaches its local APIC any more, but for `interrupt`
 *   x2apic V              -> x2apic V             the memory page of its local APIC does not respond any more
 *   begin V PE CS IP ADDRESS -> begun V N        a block of one NOP at ADDRESS is executed; N: callbacks before the block
 *   rdtsc V OFFSET COUNT  -> read V CALLS         RDTSCs of a guest whose TSC is that far behind
 *   resume V              -> resumed V
 *   interrupt V VECTOR    -> (nothing)            the local APIC gets an interrupt, also while the vCPU halts
 *   halt V                -> woke V VECTOR RAISED US     HLT until an interrupt is delivered; how many interrupts the
 *                            gateway has raised so far, and the microseconds until the HLT itself
 *   store V ADDRESS BYTES -> stored V             into RAM, at most 256 bytes
 *   burst V COUNT MEMORY  -> burst V STATUSES     COUNT HvPostMessages one after the other, whose last payload word, and
 *                            RSI, count from 0; 256 bytes of RAM at MEMORY hold the first; the sum of the results
 *   wrmsr V MSR VALUE     -> wrote V              a WRMSR that is executed natively
 *   stress SIGNALLERS KINDS COUNT -> stressed SIGNALS RAISED SENT LOST    see stress.c; needs the vCPUs idle
 *   quit
 */
#define _GNU_SOURCE
#include "gateway.h"
#include "stress.h"
#include "stub.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <x86intrin.h>

struct queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    char *lines[64];
    int head, count;
    bool abandon;
};

static struct queue queues[STUB_VCPUS];
static int vcpus;

static char *take(struct queue *queue, bool wait)
{
    char *line = NULL;

    pthread_mutex_lock(&queue->lock);
    while (wait && !queue->count) {
        pthread_cond_wait(&queue->filled, &queue->lock);
    }
    if (queue->count) {
        line = queue->lines[queue->head];
        queue->head = (queue->head + 1) % 64;
        queue->count--;
    }
    pthread_mutex_unlock(&queue->lock);
    return line;
}

static void put(struct queue *queue, const char *line)
{
    pthread_mutex_lock(&queue->lock);
    if (queue->count == 64) {
        abort();
    }
    queue->lines[(queue->head + queue->count++) % 64] = strdup(line);
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
}

static bool abandoned(struct queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    bool wanted = queue->abandon;
    queue->abandon = false;
    pthread_mutex_unlock(&queue->lock);
    return wanted;
}

static size_t parse_bytes(const char *text, uint8_t *bytes)
{
    size_t size = 0;
    unsigned int byte;

    while (size < 16 && sscanf(text + 2 * size, "%2x", &byte) == 1) {
        bytes[size++] = (uint8_t)byte;
    }
    return size;
}

static void set_mode(struct stub_vcpu *vcpu, bool long_mode, unsigned int cpl)
{
    vcpu->long_mode = long_mode;
    vcpu->registers[STUB_CR0] = 1;
    vcpu->registers[STUB_CS] = 8 | cpl;
}

enum ending { STEPPED, NATIVE, AGAIN };

/* Call back before the second instruction of a block of two; the first one is a NOP. */
static enum ending execute(struct stub_vcpu *vcpu, struct qemu_plugin_tb *tb)
{
    struct qemu_plugin_insn *insn = &tb->insns[1];
    uint64_t start = vcpu->registers[STUB_RIP];

    if (!insn->callback) {
        return NATIVE;
    }
    if (setjmp(vcpu->way_out) == 0) {
        insn->callback((unsigned int)(vcpu - stub_vcpus), insn->userdata);
        return NATIVE;
    }
    if (vcpu->registers[STUB_RIP] == start + 1 + insn->size) {
        return STEPPED;
    }
    if (vcpu->registers[STUB_RIP] != start + 1) {
        abort();
    }
    vcpu->registers[STUB_RIP] = start;
    return AGAIN;
}

static void translate_two(struct stub_vcpu *vcpu, struct qemu_plugin_tb *tb, uint64_t pc, const char *bytes)
{
    uint8_t nop = 0x90, insn[16];

    *tb = (struct qemu_plugin_tb){ .vaddr = pc };
    stub_add_insn(tb, &nop, 1);
    stub_add_insn(tb, insn, parse_bytes(bytes, insn));
    vcpu->registers[STUB_RIP] = pc;
    stub_on_translation(tb, NULL);
}

static void handle(int index, char *line);

static void run(int index, const char *line)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    uint64_t *r = vcpu->registers;
    char bytes[40];
    unsigned int long_mode, cpl, times = 0;
    uint64_t pc;
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));

    if (sscanf(line,
               "run %*d %39s %u %u %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64
               " %" SCNx64 " %" SCNx64,
               bytes, &long_mode, &cpl, &pc, &r[STUB_RAX], &r[STUB_RBX], &r[STUB_RCX], &r[STUB_RDX], &r[STUB_RSI],
               &r[STUB_RDI], &r[STUB_R8], &r[STUB_RSP]) != 12) {
        abort();
    }
    set_mode(vcpu, long_mode, cpl);
    translate_two(vcpu, tb, pc, bytes);
    enum ending ending;
    for (;;) {
        times++;
        ending = execute(vcpu, tb);
        if (ending != AGAIN) {
            break;
        }
        if (abandoned(&queues[index])) {
            printf("abandoned %d\n", index);
            free(tb);
            return;
        }
        char *nested = take(&queues[index], false);
        if (nested) {
            struct stub_vcpu saved = *vcpu;
            handle(index, nested);
            saved.sampling = vcpu->sampling;
            memcpy(saved.in_service, vcpu->in_service, sizeof(saved.in_service));
            *vcpu = saved;
        }
    }
    const char *name = ending == STEPPED ? "stepped" : "native";
    if (ending == NATIVE && r[STUB_RCX] == 0x8ff) {
        stub_on_discontinuity((unsigned int)index, QEMU_PLUGIN_DISCON_EXCEPTION, pc + 1, 0, NULL);
        name = "fault";
    }
    printf("done %d %s %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 " %u\n", index, name, r[STUB_RIP],
           r[STUB_RAX], r[STUB_RBX], r[STUB_RCX], r[STUB_RDX], times);
    free(tb);
}

static void storm(int index, unsigned int count)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    uint64_t sum = 0;

    set_mode(vcpu, true, 0);
    for (unsigned int i = 0; i < count; i++) {
        translate_two(vcpu, tb, 0x1000, "0f32");
        vcpu->registers[STUB_RCX] = 0x40000000 + i % 0x200;
        while (execute(vcpu, tb) == AGAIN) {
        }
        sum += vcpu->registers[STUB_RAX] | vcpu->registers[STUB_RDX] << 32;
    }
    printf("stormed %d %" PRIx64 "\n", index, sum);
    free(tb);
}

static const char *callback_name(const struct qemu_plugin_insn *insn)
{
    if (insn->callback) {
        if (insn->callback == on_halt) {
            return insn->flags == QEMU_PLUGIN_CB_NO_REGS ? "hlt" : "?";
        }
        static const char *const kinds[8] = { "?", "cpuid", "rdmsr", "wrmsr", "vmcall", "?", "?", "?" };
        return insn->flags == QEMU_PLUGIN_CB_RW_REGS_PC ? kinds[(uintptr_t)insn->userdata & 7] : "?";
    }
    if (insn->conditionals == 2) {
        return "both";
    }
    if (insn->conditionals == 1) {
        return insn->conditional[0] == clock_before_rdtsc ? "before" : "after";
    }
    return "-";
}

static void translate(char *line)
{
    struct stub_vcpu *vcpu = stub_current;
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    unsigned int long_mode, cpl;
    uint64_t pc;
    int used = 0;

    if (sscanf(line, "translate %u %u %" SCNx64 " %" SCNx64 " %n", &long_mode, &cpl, &pc, &tb->vaddr, &used) != 4) {
        abort();
    }
    for (char *word = strtok(line + used, " \n"); word; word = strtok(NULL, " \n")) {
        uint8_t insn[16];
        stub_add_insn(tb, insn, parse_bytes(word, insn));
    }
    set_mode(vcpu, long_mode, cpl);
    vcpu->registers[STUB_RIP] = pc;
    stub_on_translation(tb, NULL);
    printf("translated");
    for (size_t i = 0; i < tb->count; i++) {
        printf(" %s", callback_name(&tb->insns[i]));
    }
    printf("\n");
    free(tb);
}

static void deliver(int index, unsigned int vector)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    int in_service = 0;

    vcpu->in_service[vector / 32] |= UINT32_C(1) << vector % 32;
    stub_on_discontinuity((unsigned int)index, QEMU_PLUGIN_DISCON_INTERRUPT, 1, 2, NULL);
    for (int word = 0; word < 8; word++) {
        in_service += __builtin_popcount(vcpu->in_service[word]);
    }
    printf("delivered %d %d\n", index, in_service);
}

static void halt(int index)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    uint64_t begun = clock_ns();

    set_mode(vcpu, true, 0);
    translate_two(vcpu, tb, 0x1000, "f4");
    if (execute(vcpu, tb) != NATIVE) {
        abort();
    }
    uint64_t halted = clock_ns();
    for (;;) {
        for (int word = 7; word >= 0; word--) {
            uint32_t found = atomic_load(&vcpu->requested[word]);
            if (found) {
                unsigned int bit = 31 - (unsigned int)__builtin_clz(found);
                atomic_fetch_and(&vcpu->requested[word], ~(UINT32_C(1) << bit));
                stub_on_discontinuity((unsigned int)index, QEMU_PLUGIN_DISCON_INTERRUPT, 1, 2, NULL);
                printf("woke %d %x %u %" PRIu64 "\n", index, (unsigned int)word * 32 + bit, vcpu->raised,
                       (halted - begun) / 1000);
                free(tb);
                return;
            }
        }
        usleep(20);
    }
}

static void wrmsr(int index, uint32_t msr, uint64_t value)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));

    set_mode(vcpu, true, 0);
    translate_two(vcpu, tb, 0x1000, "0f30");
    vcpu->registers[STUB_RCX] = msr;
    vcpu->registers[STUB_RAX] = (uint32_t)value;
    vcpu->registers[STUB_RDX] = value >> 32;
    if (execute(vcpu, tb) != NATIVE) {
        abort();
    }
    printf("wrote %d\n", index);
    free(tb);
}

static void store(char *line)
{
    uint64_t address;
    unsigned int byte;
    int used = 0, index;

    if (sscanf(line, "store %d %" SCNx64 " %n", &index, &address, &used) != 2 || address < STUB_RAM_START) {
        abort();
    }
    for (uint64_t at = address - STUB_RAM_START; sscanf(line + used, "%2x", &byte) == 1; at++, used += 2) {
        if (at >= STUB_RAM_SIZE) {
            abort();
        }
        stub_ram[at] = (uint8_t)byte;
    }
    printf("stored %d\n", index);
}

static void burst(int index, unsigned int count, uint64_t address)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    uint64_t sum = 0;

    set_mode(vcpu, true, 0);
    for (unsigned int i = 0; i < count; i++) {
        memcpy(stub_ram + (address - STUB_RAM_START) + 252, &i, sizeof(i));
        translate_two(vcpu, tb, 0x1000, "0f01c1");
        vcpu->registers[STUB_RCX] = 0x5c;
        vcpu->registers[STUB_RDX] = address;
        vcpu->registers[STUB_RSI] = i;
        while (execute(vcpu, tb) == AGAIN) {
        }
        sum += vcpu->registers[STUB_RAX];
    }
    printf("burst %d %" PRIx64 "\n", index, sum);
    free(tb);
}

static void begin(int index, unsigned int protected_mode, unsigned int cs, uint64_t ip, uint64_t address)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    uint8_t nop = 0x90;

    set_mode(vcpu, false, 0);
    vcpu->registers[STUB_CR0] = 0x60000010 | protected_mode;
    vcpu->registers[STUB_CS] = cs;
    vcpu->registers[STUB_RIP] = ip;
    tb->vaddr = address;
    stub_add_insn(tb, &nop, 1);
    stub_on_translation(tb, NULL);
    if (tb->callback) {
        tb->callback((unsigned int)index, NULL);
    }
    printf("begun %d %d\n", index, tb->callback != NULL);
    free(tb);
}

static void rdtsc(int index, uint64_t offset, unsigned int count)
{
    struct stub_vcpu *vcpu = &stub_vcpus[index];
    unsigned int calls = 0;

    set_mode(vcpu, true, 3);
    for (unsigned int i = 0; i < count; i++) {
        if (vcpu->sampling) {
            calls++;
            clock_before_rdtsc((unsigned int)index, NULL);
        }
        uint64_t guest = __rdtsc() - offset;
        vcpu->registers[STUB_RAX] = (uint32_t)guest;
        vcpu->registers[STUB_RDX] = guest >> 32;
        if (vcpu->sampling) {
            clock_after_rdtsc((unsigned int)index, NULL);
        }
    }
    printf("read %d %u\n", index, calls);
}

static void handle(int index, char *line)
{
    unsigned int number, cs;
    uint64_t offset, address;

    if (strncmp(line, "run ", 4) == 0) {
        run(index, line);
    } else if (sscanf(line, "storm %*d %u", &number) == 1) {
        storm(index, number);
    } else if (strncmp(line, "translate ", 10) == 0) {
        translate(line);
    } else if (sscanf(line, "deliver %*d %x", &number) == 1) {
        deliver(index, number);
    } else if (strncmp(line, "deaf ", 5) == 0) {
        stub_vcpus[index].deaf = true;
        printf("deaf %d\n", index);
    } else if (strncmp(line, "x2apic ", 7) == 0) {
        stub_vcpus[index].x2apic = true;
        printf("x2apic %d\n", index);
    } else if (sscanf(line, "begin %*d %u %x %" SCNx64 " %" SCNx64, &number, &cs, &offset, &address) == 4) {
        begin(index, number, cs, offset, address);
    } else if (sscanf(line, "rdtsc %*d %" SCNx64 " %u", &offset, &number) == 2) {
        rdtsc(index, offset, number);
    } else if (strncmp(line, "halt ", 5) == 0) {
        halt(index);
    } else if (sscanf(line, "wrmsr %*d %x %" SCNx64, &number, &offset) == 2) {
        wrmsr(index, number, offset);
    } else if (strncmp(line, "store ", 6) == 0) {
        store(line);
    } else if (sscanf(line, "burst %*d %u %" SCNx64, &number, &offset) == 2) {
        burst(index, number, offset);
    } else if (strncmp(line, "resume ", 7) == 0) {
        stub_on_resume((unsigned int)index, NULL);
        printf("resumed %d\n", index);
    } else {
        fprintf(stderr, "harness: what is %s\n", line);
        abort();
    }
    free(line);
}

static void *vcpu_thread(void *argument)
{
    int index = (int)(intptr_t)argument;

    stub_current = &stub_vcpus[index];
    stub_on_vcpu((unsigned int)index, NULL);
    printf("ready %d\n", index);
    for (;;) {
        handle(index, take(&queues[index], true));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    vcpus = atoi(argv[1]);
    qemu_info_t info = {
        .target_name = "x86_64",
        .version = { .min = PLUGIN_API_VERSION, .cur = PLUGIN_API_VERSION },
        .system_emulation = true,
        .system = { .smp_vcpus = vcpus, .max_vcpus = vcpus },
    };
    if (qemu_plugin_install(1, &info, argc - 2, argv + 2) != 0) {
        return 1;
    }
    for (int i = 0; i < vcpus; i++) {
        pthread_t thread;
        pthread_mutex_init(&queues[i].lock, NULL);
        pthread_cond_init(&queues[i].filled, NULL);
        pthread_create(&thread, NULL, vcpu_thread, (void *)(intptr_t)i);
    }
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0 && strncmp(line, "quit", 4) != 0) {
        int index = 0;
        if (sscanf(line, "abandon %d", &index) == 1) {
            pthread_mutex_lock(&queues[index].lock);
            queues[index].abandon = true;
            pthread_mutex_unlock(&queues[index].lock);
            continue;
        }
        unsigned int vector, count, signallers, kinds;
        if (sscanf(line, "interrupt %d %x", &index, &vector) == 2) {
            stub_interrupt(&stub_vcpus[index], vector);
            continue;
        }
        if (sscanf(line, "stress %u %u %u", &signallers, &kinds, &count) == 3) {
            stress(vcpus, signallers, kinds, count);
            continue;
        }
        if (strncmp(line, "translate ", 10) != 0) {
            sscanf(line, "%*s %d", &index);
        }
        put(&queues[index], line);
    }
    free(line);
    stub_on_exit(NULL);
    fflush(stdout);
    _Exit(0); /* vCPU threads run on */
}
