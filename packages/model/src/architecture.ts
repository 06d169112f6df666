/**
 * Owns what one model architecture differs in from another: a table of facts, keyed by config.json's `model_type`.
 * An architecture whose graph is that of Llama is one more row; one that differs (norms on Q and K, biases on Q, K
 * and V only, other activations) is one more field here and one branch in decoder-layers.ts.
 *
 * Invariants
 * 1. Nothing outside this file compares a `model_type`.
 */

/** Names of one layer's tensors in the checkpoint, without `.weight` / `.bias`. */
export interface LayerTensorNames {
  readonly inputNorm: string;
  readonly postAttentionNorm: string;
  readonly query: string;
  readonly key: string;
  readonly value: string;
  readonly output: string;
  readonly gate: string;
  readonly up: string;
  readonly down: string;
}

export interface Architecture {
  readonly embedding: string;
  readonly finalNorm: string;
  readonly head: string;
  layer(index: number): LayerTensorNames;
}

const llama: Architecture = {
  embedding: 'model.embed_tokens',
  finalNorm: 'model.norm',
  head: 'lm_head',
  layer(index) {
    const prefix = `model.layers.${index}`;
    return {
      inputNorm: `${prefix}.input_layernorm`,
      postAttentionNorm: `${prefix}.post_attention_layernorm`,
      query: `${prefix}.self_attn.q_proj`,
      key: `${prefix}.self_attn.k_proj`,
      value: `${prefix}.self_attn.v_proj`,
      output: `${prefix}.self_attn.o_proj`,
      gate: `${prefix}.mlp.gate_proj`,
      up: `${prefix}.mlp.up_proj`,
      down: `${prefix}.mlp.down_proj`,
    };
  },
};

/** Mistral without a sliding window is Llama's graph (model-config.ts rejects the window). */
const ARCHITECTURES: ReadonlyMap<string, Architecture> = new Map([
  ['llama', llama],
  ['mistral', llama],
]);

export const SUPPORTED_MODEL_TYPES: readonly string[] = [...ARCHITECTURES.keys()];

export function architectureOf(modelType: string): Architecture | undefined {
  return ARCHITECTURES.get(modelType);
}
