/**
 * Owns what random checkpoints of each architecture look like: config.json in the architecture's own field names, and
 * the names and shapes of its tensors, as Hugging Face publishes them.
 *
 * Invariants
 * 1. Nothing here is shared with the builder: names and shapes are written down a second time.
 */
import type { RandomCheckpointOptions } from './random-options.ts';

/** What the values of a tensor are like; `offset_norm` is a norm that 1 is added to. */
export type TensorKind = 'norm' | 'offset_norm' | 'embedding' | 'bias' | 'matrix';

export interface TensorPlan {
  readonly name: string;
  readonly shape: readonly number[];
  readonly kind: TensorKind;
  /** Products of a matrix sum over this many inputs. */
  readonly inputs: number;
}

export function configOf(options: RandomCheckpointOptions): Record<string, unknown> {
  const { modelType, config } = options;
  if (modelType === 'gpt2') return { ...gpt2Config(options), ...config };
  const { attentionBias, mlpBias } = options;
  const isGemma = modelType.startsWith('gemma');
  const decoder = {
    hidden_size: options.hiddenSize,
    intermediate_size: options.intermediateSize,
    num_hidden_layers: options.numLayers,
    num_attention_heads: options.numHeads,
    num_key_value_heads: options.numKvHeads,
    head_dim: options.headDim,
    ...(isGemma ? { hidden_activation: 'gelu_pytorch_tanh' } : { hidden_act: 'silu' }),
    max_position_embeddings: options.contextLength,
    rms_norm_eps: 1e-5,
    rope_theta: options.ropeTheta,
    rope_scaling: null,
    tie_word_embeddings: options.tied,
    vocab_size: options.vocabSize,
    attention_bias: attentionBias,
    mlp_bias: mlpBias,
    eos_token_id: options.eosTokenId,
  };
  const names = { architectures: ['RandomForCausalLM'], model_type: modelType };
  if (modelType !== 'gemma3') return { ...names, ...decoder, ...config };
  return { ...names, eos_token_id: options.eosTokenId, text_config: { ...decoder, ...config }, vision_config: {} };
}

function gpt2Config(options: RandomCheckpointOptions): Record<string, unknown> {
  return {
    architectures: ['GPT2LMHeadModel'],
    model_type: 'gpt2',
    n_embd: options.hiddenSize,
    n_inner: options.intermediateSize,
    n_layer: options.numLayers,
    n_head: options.numHeads,
    n_positions: options.contextLength,
    layer_norm_epsilon: 1e-5,
    activation_function: 'gelu_new',
    ...(options.tied ? {} : { tie_word_embeddings: false }),
    vocab_size: options.vocabSize,
    eos_token_id: options.eosTokenId,
  };
}

export function tensorsOf(options: RandomCheckpointOptions): TensorPlan[] {
  const { modelType } = options;
  if (modelType === 'gpt2') return gpt2Tensors(options);
  const root = modelType === 'gemma3' ? 'language_model.model' : 'model';
  const { hiddenSize, vocabSize } = options;
  const normKind = modelType.startsWith('gemma') ? 'offset_norm' : 'norm';
  const plan = new TensorPlanner(normKind);
  plan.embedding(`${root}.embed_tokens`, [vocabSize, hiddenSize]);
  for (let layer = 0; layer < options.numLayers; layer++) addLayer(plan, `${root}.layers.${layer}`, options);
  plan.norm(`${root}.norm`, hiddenSize);
  if (!options.tied) plan.embedding('lm_head', [vocabSize, hiddenSize], 'matrix');
  return plan.tensors;
}

class TensorPlanner {
  readonly tensors: TensorPlan[] = [];
  readonly #normKind: TensorKind;

  constructor(normKind: TensorKind) {
    this.#normKind = normKind;
  }

  linear(name: string, outputs: number, inputs: number, bias: boolean): void {
    this.tensors.push({ name: `${name}.weight`, shape: [outputs, inputs], kind: 'matrix', inputs });
    if (bias) this.bias(name, outputs);
  }

  /** GPT-2's matrices lie the other way round. */
  conv1d(name: string, inputs: number, outputs: number): void {
    this.tensors.push({ name: `${name}.weight`, shape: [inputs, outputs], kind: 'matrix', inputs });
    this.bias(name, outputs);
  }

  bias(name: string, width: number): void {
    this.tensors.push({ name: `${name}.bias`, shape: [width], kind: 'bias', inputs: 1 });
  }

  norm(name: string, width: number): void {
    this.tensors.push({ name: `${name}.weight`, shape: [width], kind: this.#normKind, inputs: 1 });
  }

  embedding(name: string, shape: readonly [number, number], kind: TensorKind = 'embedding'): void {
    this.tensors.push({ name: `${name}.weight`, shape, kind, inputs: shape[1] });
  }
}

function addLayer(plan: TensorPlanner, prefix: string, options: RandomCheckpointOptions): void {
  const { modelType, hiddenSize, intermediateSize, headDim, attentionBias, mlpBias } = options;
  const queryWidth = options.numHeads * headDim;
  const kvWidth = options.numKvHeads * headDim;
  const qkvBias = attentionBias || modelType === 'qwen2';
  if (modelType === 'phi3') {
    plan.linear(`${prefix}.self_attn.qkv_proj`, queryWidth + 2 * kvWidth, hiddenSize, false);
    plan.linear(`${prefix}.self_attn.o_proj`, hiddenSize, queryWidth, false);
    plan.linear(`${prefix}.mlp.gate_up_proj`, 2 * intermediateSize, hiddenSize, false);
  } else {
    plan.linear(`${prefix}.self_attn.q_proj`, queryWidth, hiddenSize, qkvBias);
    plan.linear(`${prefix}.self_attn.k_proj`, kvWidth, hiddenSize, qkvBias);
    plan.linear(`${prefix}.self_attn.v_proj`, kvWidth, hiddenSize, qkvBias);
    plan.linear(`${prefix}.self_attn.o_proj`, hiddenSize, queryWidth, attentionBias);
    plan.linear(`${prefix}.mlp.gate_proj`, intermediateSize, hiddenSize, mlpBias);
    plan.linear(`${prefix}.mlp.up_proj`, intermediateSize, hiddenSize, mlpBias);
  }
  plan.linear(`${prefix}.mlp.down_proj`, hiddenSize, intermediateSize, mlpBias);
  if (modelType === 'qwen3' || modelType === 'gemma3' || modelType === 'gemma3_text') {
    plan.norm(`${prefix}.self_attn.q_norm`, headDim);
    plan.norm(`${prefix}.self_attn.k_norm`, headDim);
  } else if (modelType === 'olmo2') {
    plan.norm(`${prefix}.self_attn.q_norm`, queryWidth);
    plan.norm(`${prefix}.self_attn.k_norm`, kvWidth);
  }
  if (modelType !== 'olmo2') plan.norm(`${prefix}.input_layernorm`, hiddenSize);
  plan.norm(`${prefix}.post_attention_layernorm`, hiddenSize);
  if (modelType.startsWith('gemma')) plan.norm(`${prefix}.pre_feedforward_layernorm`, hiddenSize);
  if (modelType.startsWith('gemma') || modelType === 'olmo2') {
    plan.norm(`${prefix}.post_feedforward_layernorm`, hiddenSize);
  }
}

/** The first GPT-2 was published without the prefix `transformer.`, later ones with it: an untied head says which. */
function gpt2Tensors(options: RandomCheckpointOptions): TensorPlan[] {
  const { hiddenSize, intermediateSize, numLayers, vocabSize, contextLength } = options;
  const root = options.tied ? '' : 'transformer.';
  const plan = new TensorPlanner('norm');
  const norm = (name: string): void => {
    plan.norm(name, hiddenSize);
    plan.bias(name, hiddenSize);
  };
  plan.embedding(`${root}wte`, [vocabSize, hiddenSize]);
  plan.embedding(`${root}wpe`, [contextLength, hiddenSize]);
  for (let layer = 0; layer < numLayers; layer++) {
    const prefix = `${root}h.${layer}`;
    norm(`${prefix}.ln_1`);
    plan.conv1d(`${prefix}.attn.c_attn`, hiddenSize, 3 * hiddenSize);
    plan.conv1d(`${prefix}.attn.c_proj`, hiddenSize, hiddenSize);
    norm(`${prefix}.ln_2`);
    plan.conv1d(`${prefix}.mlp.c_fc`, hiddenSize, intermediateSize);
    plan.conv1d(`${prefix}.mlp.c_proj`, intermediateSize, hiddenSize);
  }
  norm(`${root}ln_f`);
  if (!options.tied) plan.embedding('lm_head', [vocabSize, hiddenSize], 'matrix');
  return plan.tensors;
}
