/**
 * Owns reading config.json: its fields, their bounds, and the defaults that its architecture leaves out of it.
 *
 * Invariants
 * 1. Every architecture's fields are known by one name here, whatever it calls them (Architecture.fieldNames).
 */
import { join } from 'node:path';
import { z } from 'zod';
import { type Architecture, architectureOf, SUPPORTED_MODEL_TYPES } from './architecture.ts';
import { modelInvalid } from './model-error.ts';
import { parseFile, readRequiredJson } from './model-files.ts';
import { ropeSchema } from './rotary.ts';

/** Token ids that config.json and generation_config.json both may give. */
export const tokenIdsSchema = z.union([z.int().nonnegative(), z.array(z.int().nonnegative())]).nullish();

const size = z.int().positive();

const configSchema = z.looseObject({
  model_type: z.string(),
  hidden_size: size,
  intermediate_size: size.nullish(),
  num_hidden_layers: size,
  num_attention_heads: size,
  num_key_value_heads: size.nullish(),
  head_dim: size.nullish(),
  vocab_size: size,
  max_position_embeddings: size,
  original_max_position_embeddings: size.nullish(),
  rms_norm_eps: z.number().positive(),
  rope_theta: z.number().positive().nullish(),
  rope_local_base_freq: z.number().positive().nullish(),
  rope_scaling: ropeSchema.nullish(),
  rope_parameters: ropeSchema
    .extend({ full_attention: ropeSchema.nullish(), sliding_attention: ropeSchema.nullish() })
    .nullish(),
  partial_rotary_factor: z.number().positive().max(1).nullish(),
  no_rope_layers: z.array(z.int()).nullish(),
  no_rope_layer_interval: size.nullish(),
  tie_word_embeddings: z.boolean(),
  attention_bias: z.boolean().nullish(),
  mlp_bias: z.boolean().nullish(),
  hidden_act: z.string(),
  query_pre_attn_scalar: z.number().positive().nullish(),
  attn_logit_softcapping: z.number().positive().nullish(),
  final_logit_softcapping: z.number().positive().nullish(),
  sliding_window: size.nullish(),
  use_sliding_window: z.boolean().nullish(),
  sliding_window_pattern: size.nullish(),
  max_window_layers: z.int().nonnegative().nullish(),
  layer_types: z.array(z.string()).nullish(),
  quantization_config: z.unknown().optional(),
  bos_token_id: z.int().nonnegative().nullish(),
  eos_token_id: tokenIdsSchema,
});

export type RawConfig = z.infer<typeof configSchema>;

const CONFIG_FILE = 'config.json';

/** config.json as it is, checked field by field, its architecture's defaults filled in. Throws model_invalid. */
export async function readRawConfig(dir: string): Promise<RawConfig> {
  const json = parseFile(
    dir,
    CONFIG_FILE,
    z.looseObject({ model_type: z.string() }),
    await readRequiredJson(dir, CONFIG_FILE),
  );
  const architecture = architectureOf(json.model_type);
  if (architecture === undefined) throw unsupported(dir, `model_type '${json.model_type}' is not supported yet`);
  const value: Record<string, unknown> = { ...architecture.defaults, ...decoderFields(dir, json, architecture) };
  for (const [ours, its] of Object.entries(architecture.fieldNames)) value[ours] = value[its] ?? value[ours];
  return parseFile(dir, CONFIG_FILE, configSchema, value);
}

/** The decoder's fields; of a model of several parts, those beside the nested ones where it has none of its own. */
function decoderFields(dir: string, json: Record<string, unknown>, { nestedConfig }: Architecture): object {
  if (nestedConfig === null) return json;
  const nested = parseFile(dir, CONFIG_FILE, z.looseObject({ [nestedConfig]: z.looseObject({}) }), json)[nestedConfig];
  const { model_type, eos_token_id, bos_token_id, tie_word_embeddings, quantization_config } = json;
  const outer = { eos_token_id, bos_token_id, tie_word_embeddings, quantization_config };
  const given = Object.fromEntries(Object.entries(outer).filter(([, value]) => value !== undefined));
  return { ...given, ...(typeof nested === 'object' ? nested : {}), model_type };
}

export function unsupported(dir: string, problem: string): Error {
  const remedy = `use a float checkpoint of one of these model types: ${SUPPORTED_MODEL_TYPES.join(', ')}`;
  return modelInvalid(join(dir, CONFIG_FILE), problem, remedy);
}

export function inconsistent(dir: string, problem: string): Error {
  return modelInvalid(join(dir, CONFIG_FILE), problem, 'restore the file from where the model was downloaded');
}
