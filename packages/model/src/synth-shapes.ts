/**
 * Owns the shapes of published models that benchmarks run with random weights, as their config.json gives them.
 *
 * Invariants
 * 1. A shape is data: config.json's fields and the tensors that follow from them. No weight is described here.
 */

export interface SyntheticShape {
  readonly modelType: 'llama' | 'qwen2' | 'qwen3';
  readonly architecture: string;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numLayers: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly vocabSize: number;
  readonly contextLength: number;
  readonly rmsNormEps: number;
  readonly ropeTheta: number;
  readonly ropeScaling?: Readonly<Record<string, number | string>>;
  readonly tied: boolean;
}

const smollm2 = {
  modelType: 'llama',
  architecture: 'LlamaForCausalLM',
  headDim: 64,
  vocabSize: 49_152,
  contextLength: 8192,
  rmsNormEps: 1e-5,
  ropeTheta: 100_000,
  tied: true,
} as const;

const llama3 = {
  modelType: 'llama',
  architecture: 'LlamaForCausalLM',
  vocabSize: 128_256,
  rmsNormEps: 1e-5,
  ropeTheta: 500_000,
} as const;

export const SYNTHETIC_SHAPES = {
  'smollm2-135m': {
    ...smollm2,
    hiddenSize: 576,
    intermediateSize: 1536,
    numLayers: 30,
    numHeads: 9,
    numKvHeads: 3,
  },
  'smollm2-360m': {
    ...smollm2,
    hiddenSize: 960,
    intermediateSize: 2560,
    numLayers: 32,
    numHeads: 15,
    numKvHeads: 5,
  },
  'qwen2.5-0.5b': {
    modelType: 'qwen2',
    architecture: 'Qwen2ForCausalLM',
    hiddenSize: 896,
    intermediateSize: 4864,
    numLayers: 24,
    numHeads: 14,
    numKvHeads: 2,
    headDim: 64,
    vocabSize: 151_936,
    contextLength: 32_768,
    rmsNormEps: 1e-6,
    ropeTheta: 1_000_000,
    tied: true,
  },
  'qwen3-0.6b': {
    modelType: 'qwen3',
    architecture: 'Qwen3ForCausalLM',
    hiddenSize: 1024,
    intermediateSize: 3072,
    numLayers: 28,
    numHeads: 16,
    numKvHeads: 8,
    headDim: 128,
    vocabSize: 151_936,
    contextLength: 40_960,
    rmsNormEps: 1e-6,
    ropeTheta: 1_000_000,
    tied: true,
  },
  'llama-3.2-1b': {
    ...llama3,
    hiddenSize: 2048,
    intermediateSize: 8192,
    numLayers: 16,
    numHeads: 32,
    numKvHeads: 8,
    headDim: 64,
    contextLength: 131_072,
    ropeScaling: {
      rope_type: 'llama3',
      factor: 32,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 8192,
    },
    tied: true,
  },
  'llama-3-8b': {
    ...llama3,
    hiddenSize: 4096,
    intermediateSize: 14_336,
    numLayers: 32,
    numHeads: 32,
    numKvHeads: 8,
    headDim: 128,
    contextLength: 8192,
    tied: false,
  },
} as const satisfies Record<string, SyntheticShape>;

export type SyntheticShapeName = keyof typeof SYNTHETIC_SHAPES;

/** A tensor to be written; `spread` is the standard deviation of its values around `mean`. */
export interface SyntheticTensor {
  readonly name: string;
  readonly dims: readonly number[];
  readonly mean: number;
  readonly spread: number;
}

/** Every tensor, embedding first. Spreads keep activations of order 1 whatever the depth. */
export function* syntheticTensors(shape: SyntheticShape): Generator<SyntheticTensor> {
  const { hiddenSize, intermediateSize } = shape;
  const queryWidth = shape.numHeads * shape.headDim;
  const kvWidth = shape.numKvHeads * shape.headDim;
  // What a layer adds to the residual shrinks with the depth, so that the sum does not grow with it.
  const branch = 1 / Math.sqrt(2 * shape.numLayers);
  const matrix = (name: string, outputs: number, inputs: number, scale = 1): SyntheticTensor => {
    return { name: `${name}.weight`, dims: [outputs, inputs], mean: 0, spread: scale / Math.sqrt(inputs) };
  };
  const norm = (name: string, width: number): SyntheticTensor => {
    return { name: `${name}.weight`, dims: [width], mean: 1, spread: 0.05 };
  };
  yield matrix('model.embed_tokens', shape.vocabSize, hiddenSize);
  for (let layer = 0; layer < shape.numLayers; layer++) {
    const prefix = `model.layers.${layer}`;
    yield norm(`${prefix}.input_layernorm`, hiddenSize);
    for (const [part, width] of [['q', queryWidth] as const, ['k', kvWidth] as const, ['v', kvWidth] as const]) {
      yield matrix(`${prefix}.self_attn.${part}_proj`, width, hiddenSize);
      if (shape.modelType !== 'qwen2') continue;
      yield { name: `${prefix}.self_attn.${part}_proj.bias`, dims: [width], mean: 0, spread: 0.1 };
    }
    if (shape.modelType === 'qwen3') {
      yield norm(`${prefix}.self_attn.q_norm`, shape.headDim);
      yield norm(`${prefix}.self_attn.k_norm`, shape.headDim);
    }
    yield matrix(`${prefix}.self_attn.o_proj`, hiddenSize, queryWidth, branch);
    yield norm(`${prefix}.post_attention_layernorm`, hiddenSize);
    yield matrix(`${prefix}.mlp.gate_proj`, intermediateSize, hiddenSize);
    yield matrix(`${prefix}.mlp.up_proj`, intermediateSize, hiddenSize);
    yield matrix(`${prefix}.mlp.down_proj`, hiddenSize, intermediateSize, branch);
  }
  yield norm('model.norm', hiddenSize);
  if (!shape.tied) yield matrix('lm_head', shape.vocabSize, hiddenSize);
}

/** config.json. Special tokens are the last two of the vocabulary (synth-tokenizer.ts). */
export function syntheticConfig(shape: SyntheticShape, torchDtype: string): Record<string, unknown> {
  return {
    architectures: [shape.architecture],
    model_type: shape.modelType,
    hidden_size: shape.hiddenSize,
    intermediate_size: shape.intermediateSize,
    num_hidden_layers: shape.numLayers,
    num_attention_heads: shape.numHeads,
    num_key_value_heads: shape.numKvHeads,
    head_dim: shape.headDim,
    hidden_act: 'silu',
    max_position_embeddings: shape.contextLength,
    rms_norm_eps: shape.rmsNormEps,
    rope_theta: shape.ropeTheta,
    rope_scaling: shape.ropeScaling ?? null,
    tie_word_embeddings: shape.tied,
    vocab_size: shape.vocabSize,
    attention_bias: shape.modelType === 'qwen2',
    mlp_bias: false,
    bos_token_id: shape.vocabSize - 2,
    eos_token_id: shape.vocabSize - 1,
    torch_dtype: torchDtype,
  };
}
