/**
 * Owns which fields of config.json decide the graph, and what of them is not supported.
 *
 * Invariants
 * 1. A field that changes the arithmetic and that the builder does not implement is rejected, never ignored.
 * 2. A ModelConfig is complete (no defaults are applied later) and holds nothing but what decides the graph.
 */
import { type Architecture, architectureOf, type BiasFact } from './architecture.ts';
import { rotaryOf, windowTokensOf } from './layer-pattern.ts';
import { inconsistent, type RawConfig, unsupported } from './raw-config.ts';
import { RopeError, type RotaryTable } from './rotary.ts';

export type Activation = 'silu' | 'gelu' | 'gelu_tanh';

export interface ModelConfig {
  readonly modelType: string;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numLayers: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly vocabSize: number;
  /** Longest sequence, in tokens: `max_position_embeddings`, or what `yarn` stretches it to. */
  readonly contextLength: number;
  readonly normEps: number;
  readonly activation: Activation;
  readonly tieWordEmbeddings: boolean;
  readonly qkvBias: boolean;
  readonly outputBias: boolean;
  readonly mlpBias: boolean;
  /** Multiplies the embeddings; null = off. */
  readonly embeddingScale: number | null;
  /** Multiplies q.k. */
  readonly attentionScale: number;
  /** Score s becomes cap * tanh(s / cap); null = off. */
  readonly attentionSoftcap: number | null;
  readonly logitSoftcap: number | null;
  /** [numLayers] Tokens that a query sees, itself included; 0 = all. */
  readonly windowTokens: readonly number[];
  readonly rotaryTables: readonly RotaryTable[];
  /** [numLayers] Index of the layer's rotary table; null: a layer without rotary embedding. */
  readonly rotaryOfLayer: readonly (number | null)[];
}

const ACTIVATIONS: ReadonlyMap<string, Activation> = new Map([
  ['silu', 'silu'],
  ['swish', 'silu'],
  ['gelu', 'gelu'],
  ['gelu_new', 'gelu_tanh'],
  ['gelu_fast', 'gelu_tanh'],
  ['gelu_pytorch_tanh', 'gelu_tanh'],
]);

/** Fields that ask for what no architecture here has, unless they have the value that says no. */
const REFUSED_FIELDS: Readonly<Record<string, { readonly harmless: readonly unknown[]; readonly problem: string }>> = {
  ...Object.fromEntries(
    ['num_experts', 'num_local_experts', 'n_routed_experts', 'moe_num_experts'].map((field) => [
      field,
      { harmless: [0, 1], problem: 'mixture-of-experts models are not supported yet' },
    ]),
  ),
  quantization_config: { harmless: [], problem: 'quantized checkpoints are not supported yet' },
  add_cross_attention: { harmless: [false], problem: 'cross-attention is not supported' },
  use_bidirectional_attention: { harmless: [false], problem: 'an encoder; only causal decoders are supported' },
  scale_attn_by_inverse_layer_idx: { harmless: [false], problem: 'another scale in every layer is not supported' },
  scale_attn_weights: { harmless: [true], problem: 'attention without a scale is not supported' },
};

/** What of config.json decides the graph. Throws model_invalid for a combination that is wrong or not supported. */
export function modelConfigOf(dir: string, raw: RawConfig): ModelConfig {
  const architecture = architectureOf(raw.model_type);
  if (architecture === undefined) throw unsupported(dir, `model_type '${raw.model_type}' is not supported yet`);
  const activation = checkSupported(dir, raw, architecture);
  const numHeads = raw.num_attention_heads;
  const numKvHeads = raw.num_key_value_heads ?? numHeads;
  if (numHeads % numKvHeads !== 0) {
    throw inconsistent(dir, `num_attention_heads ${numHeads} is no multiple of num_key_value_heads ${numKvHeads}`);
  }
  const headDim = raw.head_dim ?? raw.hidden_size / numHeads;
  if (!Number.isInteger(headDim)) {
    throw inconsistent(dir, `hidden_size ${raw.hidden_size} is no multiple of num_attention_heads ${numHeads}`);
  }
  const intermediateSize = raw.intermediate_size ?? (architecture.isGated ? null : 4 * raw.hidden_size);
  if (intermediateSize === null) throw inconsistent(dir, 'intermediate_size is missing');
  const hasBias = (fact: BiasFact, asked: boolean | null | undefined): boolean =>
    fact === 'always' || (fact === 'config' && asked === true);
  try {
    const rotary = rotaryOf(raw, architecture, headDim);
    return {
      modelType: raw.model_type,
      hiddenSize: raw.hidden_size,
      intermediateSize,
      numLayers: raw.num_hidden_layers,
      numHeads,
      numKvHeads,
      headDim,
      vocabSize: raw.vocab_size,
      contextLength: rotary.contextLength,
      normEps: raw.rms_norm_eps,
      activation,
      tieWordEmbeddings: raw.tie_word_embeddings,
      qkvBias: hasBias(architecture.qkvBias, raw.attention_bias),
      outputBias: hasBias(architecture.outputBias, raw.attention_bias),
      mlpBias: hasBias(architecture.mlpBias, raw.mlp_bias),
      embeddingScale: architecture.hasScaledEmbedding ? Math.sqrt(raw.hidden_size) : null,
      attentionScale: 1 / Math.sqrt(raw.query_pre_attn_scalar ?? headDim),
      attentionSoftcap: raw.attn_logit_softcapping ?? null,
      logitSoftcap: raw.final_logit_softcapping ?? null,
      windowTokens: windowTokensOf(raw, architecture, rotary),
      rotaryTables: rotary.tables,
      rotaryOfLayer: rotary.ofLayer,
    };
  } catch (error) {
    if (error instanceof RopeError) throw inconsistent(dir, error.message);
    throw error;
  }
}

function checkSupported(dir: string, raw: RawConfig, architecture: Architecture): Activation {
  for (const [field, { harmless, problem }] of Object.entries(REFUSED_FIELDS)) {
    const value = raw[field] ?? null;
    if (value !== null && !harmless.includes(value)) throw unsupported(dir, `${field}: ${problem}`);
  }
  const activation = ACTIVATIONS.get(raw.hidden_act);
  if (activation === undefined) {
    const name = architecture.fieldNames.hidden_act ?? 'hidden_act';
    const known = [...ACTIVATIONS.keys()].join(', ');
    throw unsupported(dir, `${name} '${raw.hidden_act}' is not supported yet (these are: ${known})`);
  }
  const window = raw.sliding_window ?? raw.max_position_embeddings;
  if (architecture.windows === 'none' && window < raw.max_position_embeddings) {
    throw unsupported(dir, `sliding_window ${window} is nothing that model_type '${raw.model_type}' has`);
  }
  return activation;
}
