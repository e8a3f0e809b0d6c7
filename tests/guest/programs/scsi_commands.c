/*
 * Sends commands to a SCSI device through SG_IO and prints what came of each: a line a command.
 *
 *     scsi_commands DEVICE NAME CDB-HEX DIRECTION BYTES [NAME CDB-HEX DIRECTION BYTES ...]
 *     scsi_commands DEVICE sweep BYTE
 *
 * DIRECTION: none, in or out (of zeros). `sweep`: every opcode, with all other bytes of the CDB being BYTE, in CDBs
 * of the length that the opcode's group has, and with every direction.
 *
 *     NAME good BYTES-TRANSFERRED          NAME KEY/ASC/ASCQ          NAME status STATUS host HOST
 */
#include <errno.h>
#include <fcntl.h>
#include <scsi/sg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define BUFFER (1 << 20)

static uint8_t *buffer;

static void command(int fd, const char *name, const uint8_t *cdb, unsigned length, int direction, unsigned bytes)
{
	uint8_t sense[32] = { 0 };
	sg_io_hdr_t io = {
		.interface_id = 'S',
		.dxfer_direction = bytes ? direction : SG_DXFER_NONE,
		.cmd_len = (unsigned char)length,
		.mx_sb_len = sizeof sense,
		.dxfer_len = bytes,
		.dxferp = buffer,
		.cmdp = (unsigned char *)cdb,
		.sbp = sense,
		.timeout = 60000,
	};

	memset(buffer, 0, bytes);
	if (ioctl(fd, SG_IO, &io) < 0)
		printf("%s error %d\n", name, errno);
	else if (io.status == 2 && io.sb_len_wr >= 14)
		printf("%s %X/%02X/%02X\n", name, sense[2] & 15, sense[12], sense[13]);
	else if (io.status || io.host_status)
		printf("%s status %d host %d\n", name, io.status, io.host_status);
	else
		printf("%s good %u\n", name, bytes - (unsigned)io.resid);
}

static unsigned parse_hex(const char *text, uint8_t *cdb)
{
	unsigned length = 0;

	for (; length < 16 && sscanf(text, "%2hhx", &cdb[length]) == 1; text += 2)
		length++;
	return length;
}

static void sweep(int fd, uint8_t fill)
{
	static const unsigned lengths[8] = { 6, 10, 10, 16, 16, 12, 10, 10 };
	static const struct {
		const char *name;
		int direction;
		unsigned bytes;
	} ways[] = { { "none", SG_DXFER_NONE, 0 }, { "in", SG_DXFER_FROM_DEV, 4096 }, { "out", SG_DXFER_TO_DEV, 4096 } };

	for (unsigned opcode = 0; opcode < 256; opcode++) {
		for (size_t way = 0; way < sizeof ways / sizeof *ways; way++) {
			uint8_t cdb[16];
			char name[32];

			memset(cdb, fill, sizeof cdb);
			cdb[0] = (uint8_t)opcode;
			snprintf(name, sizeof name, "%02X-%s", opcode, ways[way].name);
			command(fd, name, cdb, lengths[opcode >> 5], ways[way].direction, ways[way].bytes);
		}
	}
}

int main(int argc, char **argv)
{
	int fd = argc < 4 ? -1 : open(argv[1], O_RDWR | O_NONBLOCK);

	if (fd < 0)
		fd = argc < 4 ? -1 : open(argv[1], O_RDONLY | O_NONBLOCK);
	if (fd < 0) {
		perror(argc < 4 ? "usage" : argv[1]);
		return 2;
	}
	buffer = aligned_alloc(4096, BUFFER);
	if (!buffer)
		return 3;
	if (!strcmp(argv[2], "sweep")) {
		sweep(fd, (uint8_t)strtoul(argv[3], NULL, 16));
		return 0;
	}
	for (int at = 2; at + 3 < argc; at += 4) {
		uint8_t cdb[16] = { 0 };
		unsigned length = parse_hex(argv[at + 1], cdb);
		unsigned bytes = (unsigned)strtoul(argv[at + 3], NULL, 10);
		int direction = !strcmp(argv[at + 2], "out") ? SG_DXFER_TO_DEV : SG_DXFER_FROM_DEV;

		if (bytes > BUFFER || !length)
			return 2;
		command(fd, argv[at], cdb, length, strcmp(argv[at + 2], "none") ? direction : SG_DXFER_NONE, bytes);
	}
	return 0;
}
