/**
 * Owns config.json: which of its fields decide the graph, their bounds, and what of them is not supported.
 *
 * Invariants
 * 1. A field that changes the arithmetic and that the builder does not implement is rejected, never ignored.
 * 2. A ModelConfig is complete (no defaults are applied later) and holds nothing but what decides the graph.
 */
import { join } from 'node:path';
import { z } from 'zod';
import { architectureOf, SUPPORTED_MODEL_TYPES } from './architecture.ts';
import { modelInvalid } from './model-error.ts';
import { parseFile, readRequiredJson } from './model-files.ts';

export interface ModelConfig {
  readonly modelType: string;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numLayers: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly vocabSize: number;
  /** Longest sequence, in tokens: `max_position_embeddings`. */
  readonly contextLength: number;
  readonly rmsNormEps: number;
  readonly ropeTheta: number;
  readonly tieWordEmbeddings: boolean;
  readonly attentionBias: boolean;
  readonly mlpBias: boolean;
}

/** Token ids that config.json and generation_config.json both may give. */
export const tokenIdsSchema = z.union([z.int().nonnegative(), z.array(z.int().nonnegative())]).nullish();

const size = z.int().positive();

const ropeSchema = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: z.number().positive().nullish(),
});

const configSchema = z.looseObject({
  model_type: z.string(),
  hidden_size: size,
  intermediate_size: size,
  num_hidden_layers: size,
  num_attention_heads: size,
  num_key_value_heads: size.nullish(),
  head_dim: size.nullish(),
  vocab_size: size,
  max_position_embeddings: size,
  rms_norm_eps: z.number().positive().default(1e-6),
  rope_theta: z.number().positive().nullish(),
  rope_scaling: ropeSchema.nullish(),
  rope_parameters: ropeSchema.nullish(),
  partial_rotary_factor: z.number().nullish(),
  tie_word_embeddings: z.boolean().default(false),
  attention_bias: z.boolean().default(false),
  mlp_bias: z.boolean().default(false),
  hidden_act: z.string().default('silu'),
  sliding_window: z.number().nullish(),
  quantization_config: z.unknown().optional(),
  bos_token_id: z.int().nonnegative().nullish(),
  eos_token_id: tokenIdsSchema,
});

export type RawConfig = z.infer<typeof configSchema>;

const CONFIG_FILE = 'config.json';

/** config.json as it is, checked field by field. Throws model_invalid. */
export async function readRawConfig(dir: string): Promise<RawConfig> {
  const value = await readRequiredJson(dir, CONFIG_FILE);
  const { model_type: modelType } = parseFile(dir, CONFIG_FILE, z.looseObject({ model_type: z.string() }), value);
  if (architectureOf(modelType) === undefined) {
    throw unsupported(dir, `model_type '${modelType}' is not supported yet`);
  }
  return parseFile(dir, CONFIG_FILE, configSchema, value);
}

/** What of config.json decides the graph. Throws model_invalid for a combination that is wrong or not supported. */
export function modelConfigOf(dir: string, raw: RawConfig): ModelConfig {
  checkSupported(dir, raw);
  const numHeads = raw.num_attention_heads;
  const numKvHeads = raw.num_key_value_heads ?? numHeads;
  if (numHeads % numKvHeads !== 0) {
    throw inconsistent(dir, `num_attention_heads ${numHeads} is no multiple of num_key_value_heads ${numKvHeads}`);
  }
  const headDim = raw.head_dim ?? raw.hidden_size / numHeads;
  if (!Number.isInteger(headDim)) {
    throw inconsistent(dir, `hidden_size ${raw.hidden_size} is no multiple of num_attention_heads ${numHeads}`);
  }
  if (headDim % 2 !== 0) throw inconsistent(dir, `head_dim ${headDim} is odd, rotary embedding needs pairs`);
  return {
    modelType: raw.model_type,
    hiddenSize: raw.hidden_size,
    intermediateSize: raw.intermediate_size,
    numLayers: raw.num_hidden_layers,
    numHeads,
    numKvHeads,
    headDim,
    vocabSize: raw.vocab_size,
    contextLength: raw.max_position_embeddings,
    rmsNormEps: raw.rms_norm_eps,
    ropeTheta: raw.rope_parameters?.rope_theta ?? raw.rope_theta ?? 10000,
    tieWordEmbeddings: raw.tie_word_embeddings,
    attentionBias: raw.attention_bias,
    mlpBias: raw.mlp_bias,
  };
}

function checkSupported(dir: string, raw: RawConfig): void {
  for (const [field, rope] of [
    ['rope_scaling', raw.rope_scaling],
    ['rope_parameters', raw.rope_parameters],
  ] as const) {
    const type = rope?.rope_type ?? rope?.type ?? (field === 'rope_scaling' && rope ? 'unnamed' : 'default');
    if (type !== 'default') throw unsupported(dir, `${field} '${type}' is not supported yet`);
  }
  if (raw.hidden_act !== 'silu') throw unsupported(dir, `hidden_act '${raw.hidden_act}' is not supported yet`);
  if ((raw.partial_rotary_factor ?? 1) !== 1) {
    throw unsupported(dir, `partial_rotary_factor ${raw.partial_rotary_factor} is not supported yet`);
  }
  const window = raw.sliding_window ?? raw.max_position_embeddings;
  if (window < raw.max_position_embeddings) throw unsupported(dir, `sliding_window ${window} is not supported yet`);
  if (raw.quantization_config !== undefined && raw.quantization_config !== null) {
    throw unsupported(dir, 'quantization_config: quantized checkpoints are not supported yet');
  }
}

function unsupported(dir: string, problem: string): Error {
  const remedy = `use a float checkpoint of model_type ${SUPPORTED_MODEL_TYPES.join(' or ')} with plain rotary embedding`;
  return modelInvalid(join(dir, CONFIG_FILE), problem, remedy);
}

function inconsistent(dir: string, problem: string): Error {
  return modelInvalid(join(dir, CONFIG_FILE), problem, 'restore the file from where the model was downloaded');
}
