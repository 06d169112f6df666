/**
 * Owns what can be asked of a random checkpoint.
 */

export interface RandomCheckpointOptions {
  /** `model_type` of config.json. Default `llama`. */
  readonly modelType: string;
  /** Fields of config.json (the decoder's part of it) that are added or replaced, in the architecture's own names. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly eosTokenId: number | readonly number[];
  readonly numLayers: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  /** A multiple of 8, up to 256, where shards are to serve it. */
  readonly headDim: number;
  /** At least 257. */
  readonly vocabSize: number;
  readonly contextLength: number;
  readonly ropeTheta: number;
  readonly dtype: 'F32' | 'F16' | 'BF16';
  readonly tied: boolean;
  readonly attentionBias: boolean;
  readonly mlpBias: boolean;
  /** 1: model.safetensors; more: that many files and an index. */
  readonly shards: number;
  readonly seed: number;
}
