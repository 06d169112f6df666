/**
 * Owns the fields of config.json of published models, as their repositories have them: which are there, which are
 * null, which are left out. Sizes are scaled down, so that a test outgrows windows and original lengths.
 *
 * Invariants
 * 1. A field that the published file does not have is `undefined` where the random checkpoint's own would stand.
 */
import type { RandomCheckpointOptions } from './random-options.ts';

/** Fields of every random checkpoint that a published file may not have. */
const ABSENT = {
  ...{ head_dim: undefined, rope_theta: undefined, rope_scaling: undefined, tie_word_embeddings: undefined },
  ...{ attention_bias: undefined, mlp_bias: undefined, num_key_value_heads: undefined },
} as const;

const factors = (count: number, from: number): number[] => Array.from({ length: count }, (_, i) => from + i / 3);
const LLAMA3 = {
  ...{ factor: 32.0, high_freq_factor: 4.0, low_freq_factor: 1.0, original_max_position_embeddings: 32 },
  rope_type: 'llama3',
};
const GEMMA3_KINDS = ['sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention'];

export const PUBLISHED_CONFIGS: Readonly<Record<string, Partial<RandomCheckpointOptions>>> = {
  'meta-llama/Llama-2-7b-hf': {
    ...{ tied: false, numHeads: 2, numKvHeads: 2 },
    config: { ...ABSENT, num_key_value_heads: 2, pretraining_tp: 1, rope_scaling: null, tie_word_embeddings: false },
  },
  'meta-llama/Llama-3.2-1B': {
    ...{ numHeads: 4, numKvHeads: 1, dtype: 'BF16' },
    config: {
      ...{ pretraining_tp: 1, rope_theta: 500000.0, rope_scaling: LLAMA3, tie_word_embeddings: true },
      torch_dtype: 'bfloat16',
    },
  },
  'meta-llama/Llama-3.2-1B, saved by transformers 5': {
    ...{ numHeads: 4, numKvHeads: 1, dtype: 'BF16' },
    config: {
      ...{ rope_theta: undefined, rope_scaling: undefined, rope_parameters: { ...LLAMA3, rope_theta: 500000.0 } },
      dtype: 'bfloat16',
    },
  },
  'HuggingFaceTB/SmolLM2-135M': {
    ...{ hiddenSize: 48, numHeads: 3, numKvHeads: 1, dtype: 'BF16' },
    config: {
      ...{ head_dim: undefined, is_llama_config: true, pretraining_tp: 1, rope_interleaved: false },
      ...{ rope_theta: 100000, 'transformers.js_config': { kv_cache_dtype: { q4f16: 'float16' } } },
    },
  },
  'HuggingFaceTB/SmolLM3-3B': {
    ...{ modelType: 'smollm3', hiddenSize: 64, numLayers: 4, dtype: 'BF16' },
    config: {
      ...{ head_dim: undefined, tie_word_embeddings: undefined, layer_types: Array(4).fill('full_attention') },
      ...{ max_window_layers: 28, no_rope_layer_interval: 4, no_rope_layers: [1, 1, 1, 0], pretraining_tp: 2 },
      ...{ rope_theta: 5000000.0, sliding_window: null, use_sliding_window: false },
    },
  },
  'Qwen/Qwen2.5-0.5B': {
    ...{ modelType: 'qwen2', hiddenSize: 64, numHeads: 4, dtype: 'BF16' },
    config: {
      ...{ ...ABSENT, num_key_value_heads: 2, max_window_layers: 24, rope_theta: 1000000.0, sliding_window: 32 },
      ...{ tie_word_embeddings: true, use_mrope: false, use_sliding_window: false },
    },
  },
  'Qwen/Qwen2.5-7B-Instruct-1M, layer_types, yarn': {
    ...{ modelType: 'qwen2', hiddenSize: 64, numHeads: 4, dtype: 'BF16', contextLength: 32 },
    config: {
      ...{ ...ABSENT, num_key_value_heads: 2, rope_theta: 1000000.0, sliding_window: null, tie_word_embeddings: true },
      ...{ use_sliding_window: false, layer_types: ['full_attention', 'full_attention', 'full_attention'] },
      rope_scaling: { factor: 4.0, original_max_position_embeddings: 32, type: 'yarn' },
    },
  },
  'Qwen/Qwen3-0.6B': {
    ...{ modelType: 'qwen3', hiddenSize: 32, headDim: 128, dtype: 'BF16' },
    config: {
      ...{ mlp_bias: undefined, max_window_layers: 28, rope_scaling: null, rope_theta: 1000000 },
      ...{ sliding_window: null, use_sliding_window: false },
    },
  },
  'mistralai/Mistral-7B-v0.1': {
    ...{ modelType: 'mistral', hiddenSize: 64, tied: false, dtype: 'BF16' },
    config: { ...ABSENT, num_key_value_heads: 2, rope_theta: 10000.0, sliding_window: 16, tie_word_embeddings: false },
  },
  'mistralai/Mistral-7B-v0.3': {
    ...{ modelType: 'mistral', hiddenSize: 64, tied: false, dtype: 'BF16' },
    config: { ...ABSENT, num_key_value_heads: 2, rope_theta: 1000000.0, sliding_window: null },
  },
  'microsoft/Phi-3-mini-4k-instruct': {
    ...{ modelType: 'phi3', hiddenSize: 96, headDim: 48, numHeads: 2, numKvHeads: 2, tied: false, dtype: 'BF16' },
    config: {
      ...{ ...ABSENT, num_key_value_heads: 2, attention_bias: false, embd_pdrop: 0.0, resid_pdrop: 0.0 },
      ...{ original_max_position_embeddings: 96, rope_scaling: null, rope_theta: 10000.0, sliding_window: 19 },
    },
  },
  'microsoft/Phi-3-mini-128k-instruct': {
    ...{ modelType: 'phi3', hiddenSize: 96, headDim: 48, numHeads: 2, numKvHeads: 2, tied: false, dtype: 'BF16' },
    config: {
      ...{ ...ABSENT, num_key_value_heads: 2, original_max_position_embeddings: 24, sliding_window: 262144 },
      rope_scaling: { long_factor: factors(24, 1.1), short_factor: factors(24, 1), type: 'longrope' },
    },
  },
  'microsoft/Phi-4-mini-instruct': {
    ...{ modelType: 'phi3', hiddenSize: 64, headDim: 32, numHeads: 2, numKvHeads: 1, tied: true, dtype: 'BF16' },
    config: {
      ...{ head_dim: undefined, full_attn_mod: 1, interpolate_factor: 1, lm_head_bias: false, mlp_bias: false },
      ...{ original_max_position_embeddings: 24, partial_rotary_factor: 0.75, sliding_window: 262144 },
      rope_scaling: { long_factor: factors(12, 1.1), short_factor: factors(12, 1), type: 'longrope' },
    },
  },
  'microsoft/Phi-4-mini-instruct, saved by transformers 5': {
    ...{ modelType: 'phi3', hiddenSize: 64, headDim: 32, numHeads: 2, numKvHeads: 1, tied: true, dtype: 'BF16' },
    config: {
      ...{ head_dim: undefined, rope_theta: undefined, rope_scaling: undefined, original_max_position_embeddings: 24 },
      rope_parameters: {
        ...{ long_factor: factors(12, 1.1), short_factor: factors(12, 1), rope_type: 'longrope', type: 'longrope' },
        ...{ original_max_position_embeddings: 24, partial_rotary_factor: 0.75, rope_theta: 10000.0 },
      },
    },
  },
  'google/gemma-2-2b': {
    ...{ modelType: 'gemma2', hiddenSize: 48, numLayers: 4, headDim: 32, dtype: 'BF16' },
    config: {
      ...{ ...ABSENT, num_key_value_heads: 2, head_dim: 32, attention_bias: false, rope_theta: 10000.0 },
      ...{ attn_logit_softcapping: 50.0, cache_implementation: 'hybrid', final_logit_softcapping: 30.0 },
      ...{ hidden_act: 'gelu_pytorch_tanh', query_pre_attn_scalar: 256, sliding_window: 16 },
    },
  },
  'google/gemma-3-1b-it': {
    ...{ modelType: 'gemma3_text', hiddenSize: 48, numLayers: 7, headDim: 32, numKvHeads: 1, dtype: 'BF16' },
    ...{ eosTokenId: [1, 106] },
    config: {
      ...{ tie_word_embeddings: undefined, attn_logit_softcapping: null, cache_implementation: 'hybrid' },
      ...{ final_logit_softcapping: null, query_pre_attn_scalar: 256, rope_local_base_freq: 10000 },
      ...{ rope_scaling: null, rope_theta: 1000000, sliding_window: 16, sliding_window_pattern: 6 },
    },
  },
  'google/gemma-3-270m': {
    ...{ modelType: 'gemma3_text', hiddenSize: 48, numLayers: 4, headDim: 32, numKvHeads: 1, dtype: 'BF16' },
    config: {
      ...{ _sliding_window_pattern: 3, attn_logit_softcapping: null, final_logit_softcapping: null },
      ...{ layer_types: GEMMA3_KINDS, query_pre_attn_scalar: 256, rope_local_base_freq: 10000.0 },
      ...{ rope_scaling: null, rope_theta: 1000000.0, sliding_window: 16, use_bidirectional_attention: false },
    },
  },
  'google/gemma-3-270m, saved by transformers 5': {
    ...{ modelType: 'gemma3_text', hiddenSize: 48, numLayers: 4, headDim: 32, numKvHeads: 1, dtype: 'BF16' },
    config: {
      ...{ rope_theta: undefined, rope_scaling: undefined, _sliding_window_pattern: 3, layer_types: GEMMA3_KINDS },
      ...{ query_pre_attn_scalar: 256, sliding_window: 16, use_bidirectional_attention: false, dtype: 'bfloat16' },
      rope_parameters: {
        full_attention: { rope_theta: 1000000.0, rope_type: 'default' },
        sliding_attention: { rope_theta: 10000.0, rope_type: 'default' },
      },
    },
  },
  'google/gemma-3-4b-it': {
    ...{ modelType: 'gemma3', hiddenSize: 48, numLayers: 7, headDim: 256, numHeads: 8, numKvHeads: 4, dtype: 'BF16' },
    config: {
      ...{ ...ABSENT, num_attention_heads: undefined, rms_norm_eps: undefined, hidden_activation: undefined },
      ...{ rope_scaling: { factor: 8.0, rope_type: 'linear' }, sliding_window: 16 },
    },
  },
  'allenai/OLMo-2-0425-1B': {
    ...{ modelType: 'olmo2', hiddenSize: 64, numKvHeads: 4, tied: false },
    config: {
      ...{ head_dim: undefined, mlp_bias: undefined, rms_norm_eps: 1e-6, rope_scaling: null, rope_theta: 500000 },
    },
  },
  'openai-community/gpt2': {
    ...{ modelType: 'gpt2', hiddenSize: 64, intermediateSize: 256, numKvHeads: 4 },
    config: {
      ...{
        n_inner: undefined,
        attn_pdrop: 0.1,
        embd_pdrop: 0.1,
        resid_pdrop: 0.1,
        n_ctx: 96,
        summary_type: 'cls_index',
      },
      task_specific_params: { 'text-generation': { do_sample: true, max_length: 50 } },
    },
  },
};
