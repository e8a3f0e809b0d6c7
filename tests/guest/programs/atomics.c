/*
 * Changes a bit of a word that it shares with the host, with a locked instruction, as often as it can: atomics
 *
 * The word lies in the unused part of the control page of the ring to the host. Bit 0 is the guest's, the highest byte
 * the host's. It ends when the host stores something into the next word.
 */
#include "uio_link.h"

#define ECHO_INTERFACE "1db72679-86d6-4f61-b61a-d7c1e85d20ff"
#define SHARED 2048 /* bytes from the start of the page */

int main(void)
{
	struct link link = { .timeout = 30 };
	volatile uint32_t *word;

	link_open_device(&link, ECHO_INTERFACE, 0);
	word = (volatile uint32_t *)(void *)((uint8_t *)link.rings + SHARED);
	word[0] = word[1] = 0;
	printf("ready\n");
	fflush(stdout);
	while (word[1] == 0)
		for (int round = 0; round < 1000; round++)
			__asm__ volatile("lock btcl $0, %0" : "+m"(*word) : : "memory", "cc");
	printf("done\n");
	link_close(&link);
	return 0;
}
