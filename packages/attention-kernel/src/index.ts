/** Paged attention over KV blocks: one interface, a native and a portable kernel with the same results. */
export { createKernel } from './create-kernel.ts';
export type {
  AttentionKernel,
  CreateKernelOptions,
  KernelName,
  KernelStep,
  LayerFrames,
  SimdVariant,
} from './kernel.ts';
export { type ArmedAnswer, type FrameCounts, newStepState, STEP_STATE } from './layer-frames.ts';
export { type VectorOps, vectorOps } from './vector-ops.ts';
