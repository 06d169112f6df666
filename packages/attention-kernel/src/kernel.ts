/**
 * Owns the interface of paged attention: what an attention shard sees of either kernel.
 *
 * Invariants
 * 1. Both kernels give the same results within float32 rounding, and the same errors.
 * 2. A plan is checked once per step (beginStep); attend trusts it.
 * 3. `done` is called exactly once per attend that returned, in the order of the attends; before attend returns when the work
 *    is so brief that a thread would take longer to wake.
 * 4. q, k, v and o are of the dtype of the KV: f16 loses nothing of K and V, and of q and o no more than of K and V.
 */
import type { KvLayout, StepPlan } from '@lamina/tensor';
import type { ArmedAnswer, FrameCounts, NativeFrameHandler } from './layer-frames.ts';

/** A checked plan, opaque but for the plan itself. */
export interface KernelStep {
  readonly plan: StepPlan;
}

export type SimdVariant = 'avx512' | 'avx2' | 'neon' | 'scalar';

export type KernelName = 'native-avx512' | 'native-avx2' | 'native-neon' | 'native-scalar' | 'portable';

/** Frames that are answered without JavaScript. */
export interface LayerFrames {
  /** For the link that the frames come by. */
  readonly handler: NativeFrameHandler;
  /** From now on, where attention is brief. Call once per step, when a layer of it has been answered. */
  arm(step: KernelStep, answer: ArmedAnswer): void;
  /** What was answered since the last call. */
  take(): FrameCounts;
}

export interface AttentionKernel {
  readonly name: KernelName;
  readonly layout: KvLayout;
  readonly numBlocks: number;
  /** Undefined where everything passes `attend`. */
  readonly frames: LayerFrames | undefined;

  /** Checks every index of the plan; throws LaminaError('protocol_violation') naming the bad entry. */
  beginStep(plan: StepPlan): KernelStep;

  /**
   * Stores k and v at kvSlots of `layer`, then computes attention of every query row over the keys of its segment's
   * blocks whose absolute position is at most the query's and within the layer's window. Scores are scaled, then
   * soft-capped, then ALiBi is added, as the layout says. Sinks are not the kernel's: a key must be counted once, by
   * whoever merges the shards.
   *
   * @param qkv Raw little-endian bytes at any alignment: q [numQueryRows, numHeads, headDim] of layout.kvDtype, then
   * k [numKvRows, numKvHeads, headDim], then v likewise. Must stay unchanged until `done`.
   * @param out Raw bytes at any alignment: o [numQueryRows, numHeads, headDim] of layout.kvDtype, normalized over the keys
   * seen here, then lse [numQueryRows, numHeads] f32, the natural log-sum-exp of these scores. A query that sees no key
   * here gets o = 0 and lse = -Infinity. Valid from `done` on; must not overlap qkv.
   * @param done Called on the event loop. Wrong byte lengths, a wrong layer and ended handles throw at once instead.
   */
  attend(step: KernelStep, layer: number, qkv: Uint8Array, out: Uint8Array, done: (error: Error | null) => void): void;

  /** No attend may follow with this step; attends in flight still finish. */
  endStep(step: KernelStep): void;

  /** Refuses further work, waits for the attends in flight, frees the slab. */
  close(): Promise<void>;
}

export interface CreateKernelOptions {
  readonly layout: KvLayout;
  readonly numBlocks: number;
  /** Worker threads of the native kernel; the portable kernel runs on the event loop. */
  readonly numThreads: number;
  readonly kind: 'auto' | 'native' | 'portable';
  /** Forces one SIMD variant of the native kernel; for tests. */
  readonly simd?: SimdVariant;
}
