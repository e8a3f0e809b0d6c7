/*
 * Loads a kernel with kexec_file_load and starts it, or keeps it for a crash:
 *
 *     kexec KERNEL INITRD COMMAND-LINE            start it now, through an orderly restart
 *     kexec -p KERNEL INITRD COMMAND-LINE         for the next panic (needs crashkernel=)
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	unsigned long flags = 0;

	if (argc == 5 && strcmp(argv[1], "-p") == 0) {
		flags = KEXEC_FILE_ON_CRASH;
		argv++;
	} else if (argc != 4) {
		fprintf(stderr, "usage: kexec [-p] KERNEL INITRD COMMAND-LINE\n");
		return 2;
	}
	int kernel = open(argv[1], O_RDONLY | O_CLOEXEC), initrd = open(argv[2], O_RDONLY | O_CLOEXEC);
	if (kernel < 0 || initrd < 0 ||
	    syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[3]) + 1, argv[3], flags) != 0) {
		fprintf(stderr, "kexec: %s\n", strerror(errno));
		return 1;
	}
	if (flags)
		return 0;
	sync();
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
	fprintf(stderr, "kexec: %s\n", strerror(errno));
	return 1;
}
