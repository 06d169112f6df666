/**
 * Owns one table of small random models: every architecture that is supported, and every fact in which two models of
 * one architecture differ. Tests of graphs and of the cluster run over it.
 *
 * Invariants
 * 1. Windows and original lengths are shorter than ARCHITECTURE_TEST_TOKENS, so that a test of that length is beyond.
 */
import type { RandomCheckpointOptions } from './random-options.ts';

/** Tokens of a test sequence. */
export const ARCHITECTURE_TEST_TOKENS = 40;

const half = (value: (i: number) => number): number[] => Array.from({ length: 8 }, (_, i) => value(i));
const LONGROPE = {
  original_max_position_embeddings: 24,
  rope_scaling: { type: 'longrope', short_factor: half((i) => 1 + i / 20), long_factor: half((i) => 1.2 + i / 2) },
};
const GEMMA = { hiddenSize: 48, numHeads: 4, numKvHeads: 2, headDim: 16, tied: true } as const;

export const RANDOM_MODELS: Readonly<Record<string, Partial<RandomCheckpointOptions>>> = {
  'llama, plain': {},
  'llama, untied, biases, head_dim of its own': { tied: false, attentionBias: true, mlpBias: true, headDim: 32 },
  'llama, gelu': { config: { hidden_act: 'gelu' } },
  'llama, rope llama3': {
    config: {
      rope_scaling: {
        ...{ rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4 },
        original_max_position_embeddings: 32,
      },
    },
  },
  'llama, rope linear': { config: { rope_scaling: { type: 'linear', factor: 2.5 } } },
  'llama, rope dynamic': { config: { rope_scaling: { rope_type: 'dynamic', factor: 2 } } },
  'llama, rope yarn': {
    contextLength: 24,
    ropeTheta: 1000,
    config: { rope_scaling: { rope_type: 'yarn', factor: 4, original_max_position_embeddings: 24 } },
  },
  'llama, rope yarn with mscale, as rope_parameters': {
    config: {
      rope_scaling: undefined,
      rope_parameters: {
        ...{ rope_type: 'yarn', rope_theta: 500, factor: 4, original_max_position_embeddings: 24 },
        ...{ beta_fast: 4, beta_slow: 1, mscale: 1.2, mscale_all_dim: 0.5 },
      },
    },
  },
  'mistral, window': { modelType: 'mistral', config: { sliding_window: 9 } },
  'qwen2, tied': { modelType: 'qwen2' },
  'qwen2, window in late layers': {
    modelType: 'qwen2',
    tied: false,
    config: { use_sliding_window: true, sliding_window: 7, max_window_layers: 1 },
  },
  'qwen2, window that is not used': { modelType: 'qwen2', config: { use_sliding_window: false, sliding_window: 7 } },
  qwen3: { modelType: 'qwen3', headDim: 32 },
  'qwen3, untied, BF16': { modelType: 'qwen3', tied: false, dtype: 'BF16', headDim: 16 },
  smollm3: { modelType: 'smollm3', numLayers: 4 },
  'smollm3, no_rope_layers, window in them': {
    modelType: 'smollm3',
    numLayers: 4,
    config: { no_rope_layers: [1, 0, 1, 0], use_sliding_window: true, sliding_window: 11 },
  },
  'phi3, window': { modelType: 'phi3', tied: false, numKvHeads: 4, config: { sliding_window: 10 } },
  'phi3, longrope': { modelType: 'phi3', tied: false, config: LONGROPE },
  'phi3, longrope, partial rotary': {
    modelType: 'phi3',
    tied: false,
    headDim: 32,
    config: { ...LONGROPE, partial_rotary_factor: 0.5 },
  },
  'phi3, partial rotary': { modelType: 'phi3', tied: false, headDim: 32, config: { partial_rotary_factor: 0.5 } },
  'phi3, partial rotary, an odd part': {
    modelType: 'phi3',
    tied: false,
    headDim: 32,
    config: { partial_rotary_factor: 0.75 },
  },
  gemma2: {
    ...GEMMA,
    modelType: 'gemma2',
    numLayers: 4,
    config: {
      ...{ sliding_window: 8, query_pre_attn_scalar: 24 },
      ...{ attn_logit_softcapping: 1.5, final_logit_softcapping: 4 },
    },
  },
  'gemma2, default caps, F16': { ...GEMMA, modelType: 'gemma2', dtype: 'F16', config: { sliding_window: 8 } },
  gemma3_text: {
    ...GEMMA,
    modelType: 'gemma3_text',
    numLayers: 6,
    ropeTheta: 1_000_000,
    config: { sliding_window: 8, sliding_window_pattern: 3, query_pre_attn_scalar: 16, rope_local_base_freq: 100 },
  },
  'gemma3, text_config, rope linear': {
    ...GEMMA,
    modelType: 'gemma3',
    numLayers: 7,
    ropeTheta: 1_000_000,
    config: { sliding_window: 12, query_pre_attn_scalar: 20, rope_scaling: { rope_type: 'linear', factor: 8 } },
  },
  olmo2: { modelType: 'olmo2', tied: false },
  'olmo2, GQA group 1, biases': { modelType: 'olmo2', numKvHeads: 4, attentionBias: true, tied: false },
  gpt2: { modelType: 'gpt2', hiddenSize: 64, intermediateSize: 256, numKvHeads: 4 },
  'gpt2, untied, names with a prefix': {
    ...{ modelType: 'gpt2', hiddenSize: 64, intermediateSize: 96, numKvHeads: 4, tied: false, dtype: 'F16' },
  },
};
