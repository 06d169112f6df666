/** Checkpoints to ONNX graphs; tokenizer and detokenizer. No inference runtime and no environment is used here. */
export { type BuildOptions, type BuiltModel, buildModel } from './build-model.ts';
export { type DetokenizerOptions, IncrementalDetokenizer } from './detokenizer.ts';
export { type PulledModel, type PullOptions, type PullProgress, pullModel, repoMeant, resolveModel } from './hub.ts';
export type { HubAccess } from './hub-client.ts';
export { logPull, type PullLog, PullMeter, type PullPace } from './hub-progress.ts';
export { type DecoderInspection, inspectDecoder } from './inspect-decoder.ts';
export type { ModelConfig } from './model-config.ts';
export { type GenerationDefaults, type ModelDescription, readModel } from './model-description.ts';
export { encodeModelOf, type OnnxGraph, type OnnxNode, type OnnxTensor, type OpsetImport } from './onnx.ts';
export type { Activations, ModelWeights, StageWeights } from './stage-weights.ts';
export { STAGED_INPUTS, STAGED_OUTPUTS } from './staged-graph.ts';
export { type SyntheticModelOptions, writeSyntheticModel } from './synth.ts';
export { SYNTHETIC_SHAPES, type SyntheticShapeName } from './synth-shapes.ts';
export { type EncodeOptions, loadTokenizer, type Tokenizer } from './tokenizer.ts';
export { tokenizerDigest } from './tokenizer-files.ts';
export { UNCUT_NAMES } from './uncut-graph.ts';
export { WEIGHT_FORMATS, type WeightFormat } from './weight-storage.ts';
export { chooseWeights, type WeightsChoice } from './weights-choice.ts';
