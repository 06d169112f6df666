/** Owns what the native addon can do (native/addon.cc). */
import { type LoadedAddon, loadNativeModule } from '@lamina/tensor';
import type { NativeFrameHandler } from './layer-frames.ts';

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
  /** Once per kernel. `counts` [3] and `durations` are written per frame that it answers. */
  frameHandler(kernel: NativeKernelHandle, counts: Float64Array, durations: Float64Array): NativeFrameHandler;
  /** From now on frames of the step are answered by the handler, where their attention is brief. Once per step. */
  armStep(
    kernel: NativeKernelHandle,
    step: NativeStepHandle,
    expectedHeader: Uint8Array,
    answer: Uint8Array,
    reply: string,
    state: Int32Array,
    kvTokens: Float64Array,
  ): void;
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
  'frameHandler',
  'armStep',
  'endStep',
  'close',
  'supportedSimd',
  'measureBareRead',
  'measurePeakFlops',
  'toHalves',
  'toFloats',
  'argmax',
] as const satisfies readonly (keyof NativeAddon)[];

/** Loads build/lamina_attention.node; says why when it cannot. */
export function loadNativeAddon(): LoadedAddon<NativeAddon> {
  return loadNativeModule<NativeAddon>(new URL('../build/lamina_attention.node', import.meta.url), FUNCTION_NAMES);
}
