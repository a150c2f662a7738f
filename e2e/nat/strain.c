// Loaded before a service (LD_PRELOAD): its disk takes its time, and its clock is set. Both are read from the file that
// STRAIN names: two integers of 64 bits in the machine's order, microseconds a sync takes longer and seconds the time of
// day is ahead.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *strain;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("STRAIN");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *mapped = file < 0 ? MAP_FAILED : mmap(NULL, 2 * sizeof *strain, PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) strain = mapped;
}

static void take_time(void) {
    if (strain && strain[0] > 0) usleep((useconds_t)strain[0]);
}

int fsync(int file) {
    take_time();
    return (int)syscall(SYS_fsync, file);
}

int fdatasync(int file) {
    take_time();
    return (int)syscall(SYS_fdatasync, file);
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, clock, at);
    if (!failed && strain && clock == CLOCK_REALTIME) at->tv_sec += (time_t)strain[1];
    return failed;
}
