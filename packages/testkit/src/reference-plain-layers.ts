/**
 * Owns the decoder layers of the plain float64 forward passes, one function for each kind.
 *
 * Invariants
 * 1. A layer takes the residual stream of the whole sequence, one row per token, and returns the next.
 */
import {
  add,
  attend,
  gelu,
  geluTanh,
  layerNorm,
  multiplyConv1d,
  type PlainAttention,
  perHead,
  type Rows,
  silu,
} from './reference-plain-math.ts';
import type { PlainConfig, PlainModel } from './reference-plain-model.ts';
import { ropeOf, rotate } from './reference-plain-rope.ts';

/** Llama, Mistral, Qwen 2 (its biases are in the checkpoint), SmolLM3 (some layers do not rotate). */
export function llamaLayer(model: PlainModel, i: number, hidden: Rows): Rows {
  const { config } = model;
  const name = `layers.${i}`;
  const normed = hidden.map((x) => model.norm(x, `${name}.input_layernorm`));
  let queries = normed.map((x) => model.linear(`${name}.self_attn.q_proj`, x));
  let keys = normed.map((x) => model.linear(`${name}.self_attn.k_proj`, x));
  const values = normed.map((x) => model.linear(`${name}.self_attn.v_proj`, x));
  if (config.model_type !== 'smollm3' || rotatesSmolLm3(config, i)) {
    const rope = ropeOf(config, hidden.length);
    queries = queries.map((x, p) => rotate(x, p, rope, config.head_dim!));
    keys = keys.map((x, p) => rotate(x, p, rope, config.head_dim!));
  }
  const attended = attend(queries, keys, values, { ...headsOf(config), window: llamaWindow(config, i) });
  return hidden.map((x, p) => {
    const middle = add(x, model.linear(`${name}.self_attn.o_proj`, attended[p]!));
    return add(middle, gatedMlp(model, name, model.norm(middle, `${name}.post_attention_layernorm`)));
  });
}

/** Queries and keys are normalized head by head before they are rotated. */
export function qwen3Layer(model: PlainModel, i: number, hidden: Rows): Rows {
  const { config } = model;
  const name = `layers.${i}`;
  const headDim = config.head_dim!;
  const rope = ropeOf(config, hidden.length);
  const normed = hidden.map((x) => model.norm(x, `${name}.input_layernorm`));
  const [queries, keys] = ['q', 'k'].map((part) =>
    normed.map((x, p) => {
      const projected = model.linear(`${name}.self_attn.${part}_proj`, x);
      const headNorm = (head: Float64Array): Float64Array => model.norm(head, `${name}.self_attn.${part}_norm`);
      return rotate(perHead(projected, headDim, headNorm), p, rope, headDim);
    }),
  );
  const values = normed.map((x) => model.linear(`${name}.self_attn.v_proj`, x));
  const attended = attend(queries!, keys!, values, { ...headsOf(config), window: llamaWindow(config, i) });
  return hidden.map((x, p) => {
    const middle = add(x, model.linear(`${name}.self_attn.o_proj`, attended[p]!));
    return add(middle, gatedMlp(model, name, model.norm(middle, `${name}.post_attention_layernorm`)));
  });
}

/** Q, K and V in one matrix, gate and up in another; a part of each head is rotated. */
export function phi3Layer(model: PlainModel, i: number, hidden: Rows): Rows {
  const { config } = model;
  const name = `layers.${i}`;
  const headDim = config.head_dim!;
  const rope = ropeOf(config, hidden.length);
  const queryWidth = config.num_attention_heads! * headDim;
  const kvWidth = config.num_key_value_heads! * headDim;
  const qkv = hidden
    .map((x) => model.norm(x, `${name}.input_layernorm`))
    .map((x) => model.linear(`${name}.self_attn.qkv_proj`, x));
  const queries = qkv.map((x, p) => rotate(x.slice(0, queryWidth), p, rope, headDim));
  const keys = qkv.map((x, p) => rotate(x.slice(queryWidth, queryWidth + kvWidth), p, rope, headDim));
  const values = qkv.map((x) => x.slice(queryWidth + kvWidth));
  const window = config.sliding_window ?? null;
  const attended = attend(queries, keys, values, { ...headsOf(config), window });
  return hidden.map((x, p) => {
    const middle = add(x, model.linear(`${name}.self_attn.o_proj`, attended[p]!));
    const both = model.linear(`${name}.mlp.gate_up_proj`, model.norm(middle, `${name}.post_attention_layernorm`));
    const [gate, up] = [both.slice(0, both.length / 2), both.slice(both.length / 2)];
    const gated = gate.map((value, k) => silu(value) * up[k]!);
    return add(middle, model.linear(`${name}.mlp.down_proj`, gated));
  });
}

/** Norms before and after both halves; Gemma 2 caps scores, Gemma 3 normalizes heads and has a local rope. */
export function gemmaLayer(model: PlainModel, i: number, hidden: Rows): Rows {
  const { config } = model;
  const name = `layers.${i}`;
  const headDim = config.head_dim!;
  const isGemma3 = config.model_type === 'gemma3_text';
  const pattern = isGemma3 ? (i + 1) % (config.sliding_window_pattern ?? 6) !== 0 : i % 2 === 0;
  const isLocal = config.layer_types ? config.layer_types[i] === 'sliding_attention' : pattern;
  const rope = ropeOf(isGemma3 ? gemma3RopeConfig(config, isLocal) : config, hidden.length);
  const normed = hidden.map((x) => model.offsetNorm(x, `${name}.input_layernorm`));
  const [queries, keys] = ['q', 'k'].map((part) =>
    normed.map((x, p) => {
      const projected = model.linear(`${name}.self_attn.${part}_proj`, x);
      const headNorm = (head: Float64Array): Float64Array => model.offsetNorm(head, `${name}.self_attn.${part}_norm`);
      return rotate(isGemma3 ? perHead(projected, headDim, headNorm) : projected, p, rope, headDim);
    }),
  );
  const values = normed.map((x) => model.linear(`${name}.self_attn.v_proj`, x));
  const softcap = config.attn_logit_softcapping;
  const attended = attend(queries!, keys!, values, {
    ...headsOf(config),
    scale: (config.query_pre_attn_scalar ?? 256) ** -0.5,
    softcap: softcap === undefined && !isGemma3 ? 50 : (softcap ?? null),
    window: isLocal ? (config.sliding_window ?? 4096) : null,
  });
  return hidden.map((x, p) => {
    const projected = model.linear(`${name}.self_attn.o_proj`, attended[p]!);
    const middle = add(x, model.offsetNorm(projected, `${name}.post_attention_layernorm`));
    const y = model.offsetNorm(middle, `${name}.pre_feedforward_layernorm`);
    const up = model.linear(`${name}.mlp.up_proj`, y);
    const gated = model.linear(`${name}.mlp.gate_proj`, y).map((gate, k) => geluTanh(gate) * up[k]!);
    const down = model.linear(`${name}.mlp.down_proj`, gated);
    return add(middle, model.offsetNorm(down, `${name}.post_feedforward_layernorm`));
  });
}

/** Layers with a window have a rope of their own. */
function gemma3RopeConfig(config: PlainConfig, isLocal: boolean): PlainConfig {
  const { full_attention: full, sliding_attention: sliding } = config.rope_parameters ?? {};
  if (full !== undefined || sliding !== undefined) {
    return { ...config, rope_theta: isLocal ? 10_000 : 1_000_000, rope_parameters: (isLocal ? sliding : full) ?? {} };
  }
  if (!isLocal) return config;
  return { ...config, rope_theta: config.rope_local_base_freq ?? 10_000, rope_scaling: null };
}

/** Norms after both halves only; the whole projections of queries and keys are normalized. */
export function olmo2Layer(model: PlainModel, i: number, hidden: Rows): Rows {
  const { config } = model;
  const name = `layers.${i}`;
  const rope = ropeOf(config, hidden.length);
  const [queries, keys] = ['q', 'k'].map((part) =>
    hidden.map((x, p) => {
      const projected = model.linear(`${name}.self_attn.${part}_proj`, x);
      return rotate(model.norm(projected, `${name}.self_attn.${part}_norm`), p, rope, config.head_dim!);
    }),
  );
  const values = hidden.map((x) => model.linear(`${name}.self_attn.v_proj`, x));
  const attended = attend(queries!, keys!, values, headsOf(config));
  return hidden.map((x, p) => {
    const projected = model.linear(`${name}.self_attn.o_proj`, attended[p]!);
    const middle = add(x, model.norm(projected, `${name}.post_attention_layernorm`));
    return add(middle, model.norm(gatedMlp(model, name, middle), `${name}.post_feedforward_layernorm`));
  });
}

/** Matrices lie as [inputs, outputs] and all have biases; no rotation. */
export function gpt2Layer(model: PlainModel, i: number, hidden: Rows): Rows {
  const { config } = model;
  const name = `h.${i}`;
  const width = hidden[0]!.length;
  const headDim = width / config.n_head!;
  const conv1d = (part: string, x: Float64Array): Float64Array =>
    add(multiplyConv1d(model.weight(`${name}.${part}`), x), model.bias(`${name}.${part}`));
  const norm = (part: string, x: Float64Array): Float64Array =>
    layerNorm(x, model.weight(`${name}.${part}`).values, model.bias(`${name}.${part}`), config.layer_norm_epsilon!);
  const qkv = hidden.map((x) => conv1d('attn.c_attn', norm('ln_1', x)));
  const [queries, keys, values] = [0, 1, 2].map((part) => qkv.map((x) => x.slice(part * width, (part + 1) * width)));
  const attended = attend(queries!, keys!, values!, {
    numHeads: config.n_head!,
    numKvHeads: config.n_head!,
    headDim,
    scale: headDim ** -0.5,
  });
  return hidden.map((x, p) => {
    const middle = add(x, conv1d('attn.c_proj', attended[p]!));
    return add(middle, conv1d('mlp.c_proj', conv1d('mlp.c_fc', norm('ln_2', middle)).map(geluTanh)));
  });
}

function gatedMlp(model: PlainModel, name: string, x: Float64Array): Float64Array {
  const activate = model.config.hidden_act === 'gelu' ? gelu : silu;
  const up = model.linear(`${name}.mlp.up_proj`, x);
  const gated = model.linear(`${name}.mlp.gate_proj`, x).map((gate, i) => activate(gate) * up[i]!);
  return model.linear(`${name}.mlp.down_proj`, gated);
}

function headsOf(config: PlainConfig): PlainAttention {
  return {
    numHeads: config.num_attention_heads!,
    numKvHeads: config.num_key_value_heads!,
    headDim: config.head_dim!,
    scale: config.head_dim! ** -0.5,
  };
}

function llamaWindow(config: PlainConfig, i: number): number | null {
  const window = config.sliding_window ?? null;
  switch (config.model_type) {
    case 'mistral':
      return config.sliding_window === undefined ? 4096 : window;
    case 'qwen2':
    case 'qwen3':
      if (config.layer_types) {
        return config.use_sliding_window && config.layer_types[i] === 'sliding_attention' ? window : null;
      }
      return config.use_sliding_window && i >= (config.max_window_layers ?? 28) ? window : null;
    case 'smollm3':
      return config.use_sliding_window && !rotatesSmolLm3(config, i) ? window : null;
    default:
      return null;
  }
}

function rotatesSmolLm3(config: PlainConfig, i: number): boolean {
  const interval = config.no_rope_layer_interval ?? 4;
  return config.no_rope_layers ? config.no_rope_layers[i] === 1 : (i + 1) % interval !== 0;
}
