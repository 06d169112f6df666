/**
 * Owns what one model architecture differs in from another: one row of facts for each `model_type` of config.json.
 * The graph is put together from the facts (decoder-layers.ts), the weights are found by them (weight-layout.ts).
 *
 * Invariants
 * 1. Nothing outside this file compares a `model_type`.
 * 2. A row says what Hugging Face transformers computes for that type in float32; `defaults` are those of its
 *    configuration class, because a saved config.json leaves them out.
 * 3. Tensor names are relative to a root, those of a layer to the layer; none ends in `.weight` or `.bias`.
 */

/** Where tensors lie: the decoder's body and the LM head, each a prefix that ends in a dot or is empty. */
export interface TensorRoot {
  readonly body: string;
  readonly head: string;
}

/** Tensors of one layer. Several names are joined along their outputs, in this order. */
export interface LayerTensorNames {
  /** Query, key and value. */
  readonly qkv: readonly string[];
  readonly output: string;
  /** Gate and up, or the only matrix before the activation. */
  readonly gateUp: readonly string[];
  readonly down: string;
  /** Norm of what goes into the attention; null: it takes the residual stream as it is. */
  readonly inputNorm: string | null;
  /** Norm of what comes out of the attention, before it is added to the residual stream. */
  readonly attentionOutputNorm: string | null;
  readonly mlpInputNorm: string | null;
  readonly mlpOutputNorm: string | null;
  readonly queryNorm: string | null;
  readonly keyNorm: string | null;
}

/** `config`: as `attention_bias` (or `mlp_bias`) of config.json says. */
export type BiasFact = 'never' | 'always' | 'config';

/**
 * Which layers have a sliding window, where config.json has no `layer_types`:
 * `none`; `all`; `even`: layers 0, 2, ..; `pattern`: all but every `sliding_window_pattern`-th;
 * `late`: from `max_window_layers` on; `without_rotary`: those without rotary embedding; the last two only with
 * `use_sliding_window`.
 */
export type WindowFact = 'none' | 'all' | 'even' | 'pattern' | 'late' | 'without_rotary';

export interface Architecture {
  /** Values of fields that config.json leaves out. */
  readonly defaults: Readonly<Record<string, unknown>>;
  /** This type's names of fields that others call otherwise: ours to its. */
  readonly fieldNames: Readonly<Record<string, string>>;
  /** The field of config.json that holds the decoder's configuration, in a model of several parts. */
  readonly nestedConfig: string | null;
  /** Where a checkpoint may have its tensors; the first place that it uses counts. */
  readonly roots: readonly TensorRoot[];
  readonly embedding: string;
  /** Learned positions, added to the embedding; null: rotary embedding. */
  readonly positions: string | null;
  readonly finalNorm: string;
  readonly layers: string;
  readonly layer: LayerTensorNames;
  /** Matrices lie as [inputs, outputs] (Conv1D), not as [outputs, inputs]. */
  readonly isInputMajor: boolean;
  /** `rms`: x / rms(x) * gamma. `layer`: (x - mean) / deviation * gamma + beta. */
  readonly norm: 'rms' | 'layer';
  /** Added to every gamma. */
  readonly normOffset: 0 | 1;
  /** Q and K are normalized per head, or over the whole projection; null: not at all. */
  readonly queryKeyNorm: 'head' | 'projection' | null;
  readonly qkvBias: BiasFact;
  readonly outputBias: BiasFact;
  readonly mlpBias: BiasFact;
  /** activation(gate) * up, or activation(up) alone. */
  readonly isGated: boolean;
  /** Embeddings are multiplied by sqrt(hidden_size). */
  readonly hasScaledEmbedding: boolean;
  readonly windows: WindowFact;
  /** `partial_rotary_factor` is honoured. */
  readonly hasPartialRotary: boolean;
  /** Every `no_rope_layer_interval`-th layer (or as `no_rope_layers` says) is without rotary embedding. */
  readonly hasLayersWithoutRotary: boolean;
  /** Rope types that this architecture means otherwise: its name to the usual one. */
  readonly ropeTypeNames: Readonly<Record<string, string>>;
}

const NO_QUERY_KEY_NORMS = { queryNorm: null, keyNorm: null } as const;

const LLAMA_LAYER: LayerTensorNames = {
  qkv: ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
  output: 'self_attn.o_proj',
  gateUp: ['mlp.gate_proj', 'mlp.up_proj'],
  down: 'mlp.down_proj',
  inputNorm: 'input_layernorm',
  attentionOutputNorm: null,
  mlpInputNorm: 'post_attention_layernorm',
  mlpOutputNorm: null,
  ...NO_QUERY_KEY_NORMS,
};

const QUERY_KEY_NORMS = { queryNorm: 'self_attn.q_norm', keyNorm: 'self_attn.k_norm' } as const;

const LLAMA: Architecture = {
  defaults: { rms_norm_eps: 1e-6, hidden_act: 'silu', tie_word_embeddings: false, rope_theta: 10_000 },
  fieldNames: {},
  nestedConfig: null,
  roots: [{ body: 'model.', head: '' }],
  embedding: 'embed_tokens',
  positions: null,
  finalNorm: 'norm',
  layers: 'layers',
  layer: LLAMA_LAYER,
  isInputMajor: false,
  norm: 'rms',
  normOffset: 0,
  queryKeyNorm: null,
  qkvBias: 'config',
  outputBias: 'config',
  mlpBias: 'config',
  isGated: true,
  hasScaledEmbedding: false,
  windows: 'none',
  hasPartialRotary: false,
  hasLayersWithoutRotary: false,
  ropeTypeNames: {},
};

const WINDOWED: Architecture = { ...LLAMA, qkvBias: 'never', outputBias: 'never', mlpBias: 'never', windows: 'all' };

/** A config.json without `sliding_window` has the class's; `null` says that there is none. */
const MISTRAL: Architecture = { ...WINDOWED, defaults: { ...LLAMA.defaults, sliding_window: 4096 } };

const QWEN2: Architecture = {
  ...WINDOWED,
  defaults: { ...LLAMA.defaults, sliding_window: 4096, max_window_layers: 28 },
  qkvBias: 'always',
  windows: 'late',
};

const QWEN3: Architecture = {
  ...QWEN2,
  defaults: { ...QWEN2.defaults, head_dim: 128 },
  layer: { ...LLAMA_LAYER, ...QUERY_KEY_NORMS },
  queryKeyNorm: 'head',
  qkvBias: 'config',
  outputBias: 'config',
};

const SMOLLM3: Architecture = {
  ...LLAMA,
  defaults: { ...LLAMA.defaults, tie_word_embeddings: true, rope_theta: 2_000_000, no_rope_layer_interval: 4 },
  windows: 'without_rotary',
  hasLayersWithoutRotary: true,
};

const PHI3: Architecture = {
  ...WINDOWED,
  defaults: { ...LLAMA.defaults, rms_norm_eps: 1e-5, original_max_position_embeddings: 4096 },
  layer: { ...LLAMA_LAYER, qkv: ['self_attn.qkv_proj'], gateUp: ['mlp.gate_up_proj'] },
  hasPartialRotary: true,
  ropeTypeNames: { su: 'longrope', yarn: 'longrope' },
};

const GEMMA_DEFAULTS = {
  rms_norm_eps: 1e-6,
  hidden_size: 2304,
  intermediate_size: 9216,
  num_hidden_layers: 26,
  num_attention_heads: 8,
  num_key_value_heads: 4,
  head_dim: 256,
  hidden_activation: 'gelu_pytorch_tanh',
  query_pre_attn_scalar: 256,
  sliding_window: 4096,
  tie_word_embeddings: true,
  bos_token_id: 2,
  eos_token_id: 1,
} as const;

const GEMMA2: Architecture = {
  ...LLAMA,
  defaults: {
    ...GEMMA_DEFAULTS,
    vocab_size: 256_000,
    max_position_embeddings: 8192,
    rope_theta: 10_000,
    final_logit_softcapping: 30,
    attn_logit_softcapping: 50,
  },
  fieldNames: { hidden_act: 'hidden_activation' },
  layer: {
    ...LLAMA_LAYER,
    attentionOutputNorm: 'post_attention_layernorm',
    mlpInputNorm: 'pre_feedforward_layernorm',
    mlpOutputNorm: 'post_feedforward_layernorm',
  },
  normOffset: 1,
  mlpBias: 'never',
  hasScaledEmbedding: true,
  windows: 'even',
};

const GEMMA3: Architecture = {
  ...GEMMA2,
  defaults: {
    ...GEMMA_DEFAULTS,
    vocab_size: 262_208,
    max_position_embeddings: 131_072,
    rope_theta: 1_000_000,
    rope_local_base_freq: 10_000,
    sliding_window_pattern: 6,
  },
  layer: { ...GEMMA2.layer, ...QUERY_KEY_NORMS },
  queryKeyNorm: 'head',
  windows: 'pattern',
};

/** As published, and as newer versions of transformers save it. */
const GEMMA3_PART_ROOTS: readonly TensorRoot[] = [
  { body: 'language_model.model.', head: 'language_model.' },
  { body: 'model.language_model.', head: '' },
];

const OLMO2: Architecture = {
  ...LLAMA,
  defaults: { ...LLAMA.defaults, rms_norm_eps: 1e-5 },
  layer: {
    ...LLAMA_LAYER,
    ...QUERY_KEY_NORMS,
    inputNorm: null,
    attentionOutputNorm: 'post_attention_layernorm',
    mlpInputNorm: null,
    mlpOutputNorm: 'post_feedforward_layernorm',
  },
  queryKeyNorm: 'projection',
  mlpBias: 'never',
};

const GPT2: Architecture = {
  ...LLAMA,
  defaults: {
    vocab_size: 50_257,
    n_positions: 1024,
    n_embd: 768,
    n_layer: 12,
    n_head: 12,
    layer_norm_epsilon: 1e-5,
    activation_function: 'gelu_new',
    tie_word_embeddings: true,
  },
  fieldNames: {
    hidden_size: 'n_embd',
    intermediate_size: 'n_inner',
    num_hidden_layers: 'n_layer',
    num_attention_heads: 'n_head',
    max_position_embeddings: 'n_positions',
    rms_norm_eps: 'layer_norm_epsilon',
    hidden_act: 'activation_function',
  },
  roots: ['', 'transformer.'].map((body) => ({ body, head: '' })),
  embedding: 'wte',
  positions: 'wpe',
  finalNorm: 'ln_f',
  layers: 'h',
  layer: {
    qkv: ['attn.c_attn'],
    output: 'attn.c_proj',
    gateUp: ['mlp.c_fc'],
    down: 'mlp.c_proj',
    inputNorm: 'ln_1',
    attentionOutputNorm: null,
    mlpInputNorm: 'ln_2',
    mlpOutputNorm: null,
    ...NO_QUERY_KEY_NORMS,
  },
  isInputMajor: true,
  norm: 'layer',
  qkvBias: 'always',
  outputBias: 'always',
  mlpBias: 'always',
  isGated: false,
};

/** Llama 2, 3, 3.1, 3.2 and SmolLM2 are `llama`; Qwen 2.5 is `qwen2`; of `gemma3` the text decoder runs. */
const ARCHITECTURES: ReadonlyMap<string, Architecture> = new Map([
  ['llama', LLAMA],
  ['mistral', MISTRAL],
  ['qwen2', QWEN2],
  ['qwen3', QWEN3],
  ['smollm3', SMOLLM3],
  ['phi3', PHI3],
  ['gemma2', GEMMA2],
  ['gemma3_text', GEMMA3],
  ['gemma3', { ...GEMMA3, nestedConfig: 'text_config', roots: GEMMA3_PART_ROOTS }],
  ['olmo2', OLMO2],
  ['gpt2', GPT2],
]);

export const SUPPORTED_MODEL_TYPES: readonly string[] = [...ARCHITECTURES.keys()];

export function architectureOf(modelType: string): Architecture | undefined {
  return ARCHITECTURES.get(modelType);
}
