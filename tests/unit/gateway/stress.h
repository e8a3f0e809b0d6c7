/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef STRESS_H
#define STRESS_H

void stress(int vcpus, unsigned int signallers, unsigned int kinds, unsigned int count);

#endif
