/** Checkpoints to ONNX graphs; tokenizer and detokenizer. No inference runtime and no environment is used here. */
export { type BuildOptions, type BuiltModel, buildModel } from './build-model.ts';
export { type DetokenizerOptions, IncrementalDetokenizer } from './detokenizer.ts';
export type { ModelConfig } from './model-config.ts';
export { type GenerationDefaults, type ModelDescription, readModel } from './model-description.ts';
export { STAGED_INPUTS, STAGED_OUTPUTS } from './staged-graph.ts';
export { type EncodeOptions, loadTokenizer, type Tokenizer } from './tokenizer.ts';
export { UNCUT_NAMES } from './uncut-graph.ts';
