/* SPDX-License-Identifier: MIT */
/*
 * A driver for targets where clang's libFuzzer is not installed: changes seeds at random, without guidance.
 *
 *   target SECONDS SEED FOLDER...      prints the number of executions; the last input is in ./last-input
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "fuzz.h"

enum { SEEDS = 4096, MOST = 8192 };

static struct { uint8_t *data; size_t size; } seeds[SEEDS];
static size_t count;
static uint64_t state;

static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void read_folder(const char *folder)
{
    char path[4096];
    DIR *opened = opendir(folder);
    struct dirent *entry;

    while (opened && (entry = readdir(opened)) && count < SEEDS) {
        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (file) {
            seeds[count].data = malloc(MOST);
            seeds[count].size = fread(seeds[count].data, 1, MOST, file);
            count++;
            fclose(file);
        }
    }
    if (opened)
        closedir(opened);
}

int main(int argc, char **argv)
{
    uint64_t executions = 0;
    uint8_t *input = malloc(MOST);
    time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 10);

    state = 88172645463325252u ^ (argc > 2 ? strtoull(argv[2], NULL, 0) : 1) * 0x9e3779b97f4a7c15u;
    for (int i = 3; i < argc; i++)
        read_folder(argv[i]);
    for (size_t i = 0; i < count; i++, executions++)
        LLVMFuzzerTestOneInput(seeds[i].data, seeds[i].size);
    while (time(NULL) < end) {
        size_t size = count ? seeds[next() % count].size : next() % 256;
        for (size_t i = 0; !count && i < size; i++)
            input[i] = (uint8_t)next();
        if (count) {
            size_t chosen = next() % count;
            size = seeds[chosen].size;
            memcpy(input, seeds[chosen].data, size);
        }
        for (uint64_t changes = 1 + next() % 6; changes && size; changes--) {
            if (next() % 4)
                input[next() % size] ^= (uint8_t)(1u << next() % 8);
            else
                input[next() % size] = next() % 2 ? 0xff : (uint8_t)next();
        }
        if (next() % 8 == 0)
            size = next() % (size + 1);
        LLVMFuzzerTestOneInput(input, size);
        executions++;
    }
    printf("%llu executions\n", (unsigned long long)executions);
    return 0;
}
