/**
 * Owns the loading of the native addon and the one checked place where it gets a type.
 *
 * Invariants
 * 1. A module without every expected function is not used: an addon of another version falls back like a missing one.
 */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

/** Opaque pointers of the addon. */
export type NativeKernelHandle = { readonly __nativeKernel: never };
export type NativeStepHandle = { readonly __nativeStep: never };

/** What native/addon.cc exports. Every function throws an Error on bad arguments. */
export interface NativeAddon {
  create(
    numLayers: number,
    numHeads: number,
    numKvHeads: number,
    headDim: number,
    scale: number,
    /** 0 = off. */
    softcap: number,
    /** [numLayers], 0 = all; empty = all in every layer. */
    windowTokens: Int32Array,
    /** [numHeads], or empty. */
    alibiSlopes: Float32Array,
    blockSizeTokens: number,
    isF16: boolean,
    numBlocks: number,
    numThreads: number,
    /** '' = the fastest that this processor and shape allow. */
    simd: string,
    onDone: (id: number) => void,
  ): NativeKernelHandle;
  kernelName(kernel: NativeKernelHandle): string;
  beginStep(
    kernel: NativeKernelHandle,
    numQueryRows: number,
    numKvRows: number,
    segments: Int32Array,
    blocks: Int32Array,
    kvSlots: Int32Array,
  ): NativeStepHandle;
  /** True when it was brief and is done; else onDone(id) is called later. */
  attend(
    kernel: NativeKernelHandle,
    step: NativeStepHandle,
    layer: number,
    qkv: Uint8Array,
    out: Uint8Array,
    id: number,
  ): boolean;
  endStep(step: NativeStepHandle): void;
  close(kernel: NativeKernelHandle): void;
  /** Names that `simd` may have on this processor, fastest first. */
  supportedSimd(): string[];
  /** Seconds to read the first numBytes of the slab and add them up: the yardstick of bench/read-bandwidth.mjs. */
  measureBareRead(kernel: NativeKernelHandle, numBytes: number, numThreads: number): number;
  /** Floating-point operations per second of one core that does nothing but multiply-adds. */
  measurePeakFlops(kernel: NativeKernelHandle): number;
  /** `count` values from `start` on, rounded to the nearest float16, to `target` from element `at` on. */
  toHalves(source: Float32Array, start: number, count: number, target: Uint16Array, at: number): void;
  /** The first `count` float16 of `source`, at any alignment. */
  toFloats(source: Uint8Array, count: number, target: Float32Array): void;
  /** Index of the first largest value; -1 when that is not finite or some value is NaN. */
  argmax(values: Float32Array): number;
}

const FUNCTION_NAMES = [
  'create',
  'kernelName',
  'beginStep',
  'attend',
  'endStep',
  'close',
  'supportedSimd',
  'measureBareRead',
  'measurePeakFlops',
  'toHalves',
  'toFloats',
  'argmax',
] as const satisfies readonly (keyof NativeAddon)[];

function isNativeAddon(module: unknown): module is NativeAddon {
  if (typeof module !== 'object' || module === null) return false;
  const entries = new Map(Object.entries(module));
  return FUNCTION_NAMES.every((name) => typeof entries.get(name) === 'function');
}

export type LoadedAddon = { readonly addon: NativeAddon } | { readonly addon: null; readonly reason: string };

/** Loads build/lamina_attention.node; says why when it cannot. */
export function loadNativeAddon(): LoadedAddon {
  const path = fileURLToPath(new URL('../build/lamina_attention.node', import.meta.url));
  let module: unknown;
  try {
    module = createRequire(import.meta.url)(path);
  } catch (error) {
    const detail = error instanceof Error ? (error.message.split('\n')[0] ?? '') : String(error);
    const isMissing = error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND';
    return { addon: null, reason: isMissing ? 'the native addon is not built' : `the addon does not load: ${detail}` };
  }
  if (!isNativeAddon(module)) return { addon: null, reason: 'the native addon is of another version; build it again' };
  return { addon: module };
}
