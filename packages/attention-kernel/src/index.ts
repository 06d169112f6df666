/** Paged attention over KV blocks: one interface, a native and a portable kernel with the same results. */
export { createKernel } from './create-kernel.ts';
export { type HalfFloats, halfFloats } from './half-floats.ts';
export type {
  AttentionKernel,
  CreateKernelOptions,
  KernelName,
  KernelStep,
  SimdVariant,
  StepPlan,
} from './kernel.ts';
