/**
 * Owns bulk conversion between float32 and float16, by the native addon where there is one.
 *
 * Invariants
 * 1. Both ways round the same: to nearest, ties to even, beyond the range to infinity.
 */
import { floatsToHalves, halvesToFloats } from '@lamina/tensor';
import { loadNativeAddon } from './native-addon.ts';

export interface HalfFloats {
  /** `count` values of `source` from `start` on, rounded, to `target` from element `at` on. */
  toHalves(source: Float32Array, start: number, count: number, target: Uint16Array, at: number): void;
  /** The first `count` float16 of `source`, little-endian at any alignment. */
  toFloats(source: Uint8Array, count: number, target: Float32Array): void;
}

export function halfFloats(): HalfFloats {
  const { addon } = loadNativeAddon();
  return addon ?? { toHalves: floatsToHalves, toFloats: halvesToFloats };
}
