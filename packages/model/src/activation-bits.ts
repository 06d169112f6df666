/**
 * Owns to how many bits activations are rounded before a product of integers: as many as this processor multiplies exactly.
 *
 * Invariants
 * 1. x86 without a dot product of bytes (VNNI) adds two products of bytes in 16 bits and saturates: with weights up to 127,
 *    activations must stay below 128, 2 * 127 * 127 < 2^15. Whoever is not known to have one is taken to have none.
 */
import { readFileSync } from 'node:fs';

/** 8: unsigned bytes about 128. 7: about 64. */
export type ActivationBits = 7 | 8;

const DOT_PRODUCT_FLAGS = /\b(?:avx512_vnni|avx_vnni)\b/;

/** @param cpuInfo /proc/cpuinfo of this machine, '' if it has none. */
export function activationBitsOf(arch: string, cpuInfo: string): ActivationBits {
  return arch === 'arm64' || DOT_PRODUCT_FLAGS.test(cpuInfo) ? 8 : 7;
}

export function activationBitsHere(): ActivationBits {
  try {
    return activationBitsOf(process.arch, readFileSync('/proc/cpuinfo', 'utf8'));
  } catch {
    return activationBitsOf(process.arch, '');
  }
}
