/* Records what a program does to the files below a folder: to be preloaded by powerloss.py, which reads the records.

   RECORD_ROOT names the folder, RECORD_TO the file of records. Each is a head, a path, and what was written. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct head { uint8_t kind, synced; uint16_t path; uint32_t data; uint64_t offset; };

static void record(char kind, int synced, const char *path, uint64_t offset, const struct iovec *data, int count, size_t size)
{
    int before = errno;  /* opened each time: a child closes all that it has not opened itself */
    int to = getenv("RECORD_TO") ? syscall(SYS_openat, AT_FDCWD, getenv("RECORD_TO"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    struct head head = { kind, synced, strlen(path), size, offset };
    struct iovec all[1026] = { { &head, sizeof head }, { (void *)path, head.path } };
    size_t left = size;
    int n = 2;
    for (int i = 0; i < count && left && n < 1026; i++, n++) {
        all[n] = data[i];
        if (all[n].iov_len > left) all[n].iov_len = left;
        left -= all[n].iov_len;
    }
    if (to >= 0) {
        syscall(SYS_writev, to, all, n > 1024 ? 1024 : n);
        syscall(SYS_close, to);
    }
    errno = before;
}

static int ours(const char *path) { const char *root = getenv("RECORD_ROOT"); return root && !strncmp(path, root, strlen(root)); }

static int named(int fd, char *path)
{
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, 4095);
    path[size < 0 ? 0 : size] = 0;
    return ours(path);
}

static int real_name(const char *path, char *out)
{
    char folder[4096], whole[PATH_MAX];
    const char *slash = strrchr(path, '/');
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    if (!realpath(folder, whole)) return 0;
    return snprintf(out, 4096, "%s/%s", whole, slash ? slash + 1 : path) < 4096 && ours(out);
}

static ssize_t wrote(int fd, const struct iovec *data, int count, int64_t offset, ssize_t size)
{
    char path[4096];
    if (size > 0 && named(fd, path)) {
        if (offset < 0) offset = lseek(fd, 0, SEEK_CUR) - size;
        record('w', (fcntl(fd, F_GETFL) & O_DSYNC) != 0, path, offset, data, count, size);
    }
    return size;
}

ssize_t write(int fd, const void *data, size_t size)
{
    struct iovec one = { (void *)data, size };
    return wrote(fd, &one, 1, -1, syscall(SYS_write, fd, data, size));
}
ssize_t writev(int fd, const struct iovec *data, int count) { return wrote(fd, data, count, -1, syscall(SYS_writev, fd, data, count)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    struct iovec one = { (void *)data, size };
    return wrote(fd, &one, 1, at, syscall(SYS_pwrite64, fd, data, size, at));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

static int synced(int fd, int result)
{
    char path[4096];
    if (!result && named(fd, path)) record('s', 1, path, 0, 0, 0, 0);
    return result;
}
int fsync(int fd) { return synced(fd, syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { return synced(fd, syscall(SYS_fdatasync, fd)); }

static int renamed(const char *from, const char *to, int result)
{
    char a[4096], b[4096];
    if (!result && real_name(from, a) && real_name(to, b)) {
        struct iovec one = { b, strlen(b) };
        record('r', 0, a, 0, &one, 1, one.iov_len);
    }
    return result;
}
int rename(const char *from, const char *to) { return renamed(from, to, syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to)); }

int unlink(const char *path)
{
    char whole[4096];
    int result = syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (!result && real_name(path, whole)) record('u', 0, whole, 0, 0, 0, 0);
    return result;
}

int mkdir(const char *path, mode_t mode)
{
    char whole[4096];
    int result = syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    if (!result && real_name(path, whole)) record('m', 0, whole, 0, 0, 0, 0);
    return result;
}

int ftruncate64(int fd, off64_t size)
{
    char path[4096];
    int result = syscall(SYS_ftruncate, fd, size);
    if (!result && named(fd, path)) record('t', 0, path, size, 0, 0, 0);
    return result;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int posix_fallocate64(int fd, off64_t at, off64_t size)
{
    char path[4096];
    int result = syscall(SYS_fallocate, fd, 0, at, size) ? errno : 0;
    if (!result && named(fd, path)) record('t', 0, path, at + size, 0, 0, 0);
    return result;
}
int posix_fallocate(int fd, off_t at, off_t size) { return posix_fallocate64(fd, at, size); }

static int opened(int fd, int flags)
{
    char path[4096];
    if (fd >= 0 && flags & O_CREAT && named(fd, path)) record('c', 0, path, (flags & O_TRUNC) != 0, 0, 0, 0);
    return fd;
}
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(syscall(SYS_openat, AT_FDCWD, path, flags, mode), flags); }
int open(const char *path, int flags, ...) { MODE(flags) return opened(syscall(SYS_openat, AT_FDCWD, path, flags, mode), flags); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return opened(syscall(SYS_openat, at, path, flags, mode), flags); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return opened(syscall(SYS_openat, at, path, flags, mode), flags); }
