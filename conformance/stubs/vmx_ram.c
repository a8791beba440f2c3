// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Preloaded into Bochs, which has neither RAM that can be shared nor a display without a port.
//
// Bochs allocates guest RAM, and the ROMs behind it, at once; nothing else there is nearly as large. It comes from the file
// that CONFORMANCE_RAM names instead, of CONFORMANCE_RAM_BYTES bytes; what is more than that stays private.
// The display "rfb" waits for viewers on a port. Here it waits for ever, on a socket that is bound to nothing.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void __libc_free(void *);

static char *ram, *end;

void *malloc(size_t bytes)
{
    const char *file, *size;
    size_t shared, all = (bytes + 4095) & ~(size_t)4095;
    int fd;

    if (ram || bytes < 32u << 20 || !(file = getenv("CONFORMANCE_RAM")) || !(size = getenv("CONFORMANCE_RAM_BYTES")))
        return __libc_malloc(bytes);
    shared = strtoul(size, NULL, 10);
    fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0 || shared > all)
        abort();
    ram = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED || mmap(ram, shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
        abort();
    close(fd);
    end = ram + all;
    return ram;
}

void free(void *at)
{
    if (!ram || (char *)at < ram || (char *)at >= end)
        __libc_free(at);
}

int bind(int fd, const struct sockaddr *address, socklen_t bytes)
{
    (void)fd, (void)address, (void)bytes;
    return 0;
}

int listen(int fd, int most)
{
    (void)fd, (void)most;
    return 0;
}

int accept(int fd, struct sockaddr *address, socklen_t *bytes)
{
    (void)fd, (void)address, (void)bytes;
    for (;;)
        pause();
}
