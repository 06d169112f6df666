/** The vocabulary of Lamina: errors, dtypes, the attention spec and the attention gather. Imports nothing. */
export { AttentionGather, applySinks } from './attention-gather.ts';
export {
  type AttentionSpec,
  blockBytes,
  elementBytes,
  HEAD_DIM_RANGE,
  type KvDtype,
  type KvLayout,
  kvBytesPerToken,
  maxWindowTokens,
  sameAttentionSpec,
  sameKvLayout,
} from './attention-spec.ts';
export {
  asLaminaError,
  ERROR_CODES,
  type ErrorCode,
  isErrorCode,
  LaminaError,
  type LaminaErrorOptions,
} from './errors.ts';
export {
  bfloat16BitsToFloat32,
  float16BitsToFloat32,
  float16Table,
  float32ToFloat16Bits,
  floatsToHalves,
  halvesToFloats,
} from './float16.ts';
export { type LoadedAddon, loadNativeModule } from './native-module.ts';
export {
  attendBytes,
  BLOCK_FIELDS,
  partialBytes,
  SEGMENT_FIELDS,
  type StepPlan,
  type TensorLayout,
} from './step-plan.ts';
