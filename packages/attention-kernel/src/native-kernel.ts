/**
 * Owns the native kernel: attention on its own threads, brief attention at once, completion on the event loop.
 *
 * Invariants
 * 1. The addon only ever sees plans, layers and lengths that plan-check.ts has passed.
 */
import type { KvLayout } from '@lamina/tensor';
import type { KernelName, LayerFrames } from './kernel.ts';
import { KernelBase, type PendingAttend } from './kernel-base.ts';
import { FrameTally } from './layer-frames.ts';
import type { NativeAddon, NativeKernelHandle, NativeStepHandle } from './native-addon.ts';
import type { CheckedPlan } from './plan-check.ts';

const NATIVE_NAMES: readonly KernelName[] = ['native-avx512', 'native-avx2', 'native-neon', 'native-scalar'];

export class NativeKernel extends KernelBase<NativeStepHandle> {
  override readonly name: KernelName;
  readonly #addon: NativeAddon;
  readonly #handle: NativeKernelHandle;
  override readonly frames: LayerFrames;

  /** Throws the addon's Error when memory, threads or the variant cannot be had. */
  constructor(addon: NativeAddon, layout: KvLayout, numBlocks: number, numThreads: number, simd: string) {
    super(layout, numBlocks);
    this.#addon = addon;
    this.#handle = addon.create(
      layout.numLayers,
      layout.numHeads,
      layout.numKvHeads,
      layout.headDim,
      layout.scale,
      layout.softcap ?? 0,
      Int32Array.from(layout.windowTokens ?? []),
      Float32Array.from(layout.alibiSlopes ?? []),
      layout.blockSizeTokens,
      layout.kvDtype === 'f16',
      numBlocks,
      numThreads,
      simd,
      (id) => this.finish(id, null),
    );
    const name = addon.kernelName(this.#handle);
    const tally = new FrameTally();
    this.frames = {
      handler: addon.frameHandler(this.#handle, tally.counts, tally.durationsSeconds),
      arm: (step, { expectedHeader, answer, reply, state, kvTokens }) =>
        addon.armStep(this.#handle, this.stateOf(step), expectedHeader, answer, reply, state, kvTokens),
      take: () => tally.take(),
    };
    this.name = NATIVE_NAMES.find((known) => known === name) ?? 'native-scalar';
  }

  /** Seconds to read the first numBytes of the slab on numThreads threads; blocks. For benchmarks. */
  measureBareRead(numBytes: number, numThreads: number): number {
    return this.#addon.measureBareRead(this.#handle, numBytes, numThreads);
  }

  /** Floating-point operations per second of one core that does nothing but multiply-adds; blocks for milliseconds. */
  measurePeakFlops(): number {
    return this.#addon.measurePeakFlops(this.#handle);
  }

  protected override makeState(checked: CheckedPlan): NativeStepHandle {
    const { numQueryRows, numKvRows, segments, blocks, kvSlots } = checked;
    return this.#addon.beginStep(this.#handle, numQueryRows, numKvRows, segments, blocks, kvSlots);
  }

  protected override start({ state, layer, qkv, out, id }: PendingAttend<NativeStepHandle>): boolean {
    return this.#addon.attend(this.#handle, state, layer, qkv, out, id);
  }

  protected override release(state: NativeStepHandle): void {
    this.#addon.endStep(state);
  }

  protected override free(): void {
    this.#addon.close(this.#handle);
  }
}
