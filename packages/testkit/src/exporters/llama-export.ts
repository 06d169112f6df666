/**
 * Owns a Llama-shaped decoder as exporters write it down: everything but its attention (llama-attention.ts).
 *
 *   fused    SimplifiedLayerNormalization and SkipSimplifiedLayerNormalization, as graph optimizers and builders give
 *   written  norms as Pow, ReduceMean, Sqrt, Div, Mul, as torch.onnx.export traces them
 */
import type { ExportOptions } from './export-options.ts';
import { ELEMENT, GraphMaker } from './graph-maker.ts';
import { attentionWriter } from './llama-attention.ts';

export function makeLlama(options: ExportOptions): GraphMaker {
  const { hiddenSize, vocabSize, numLayers, numKvHeads, headDim, form } = options;
  const maker = new GraphMaker(options.precision, options.seed);
  const isWritten = form.operator === 'eager' || form.operator === 'onnx';
  maker.input('input_ids', ELEMENT.int64, ['batch_size', 'sequence_length']);
  maker.input('attention_mask', ELEMENT.int64, ['batch_size', 'total_sequence_length']);
  const hasPositions = form.operator !== 'gqa' || form.rotary === 'before';
  if (hasPositions) maker.input('position_ids', ELEMENT.int64, ['batch_size', 'sequence_length']);
  const cacheDims = (past: string): (number | string)[] => ['batch_size', numKvHeads, past, headDim];
  for (let layer = 0; layer < numLayers; layer++) {
    for (const part of ['key', 'value']) {
      maker.input(`past_key_values.${layer}.${part}`, maker.floatType, cacheDims('past_sequence_length'));
    }
  }
  maker.output('logits', ELEMENT.float, ['batch_size', 'sequence_length', vocabSize]);
  const embedding = maker.weight('model.embed_tokens.weight', [vocabSize, hiddenSize], 2);
  const embedded = maker.add('Gather', [embedding, 'input_ids']);
  let hidden = embedded;
  const attend = attentionWriter(maker, options);
  let delta: string | undefined;
  const normalize = (name: string): string => {
    const gamma = maker.weight(`${name}.weight`, [hiddenSize], 0.5, 1);
    const { sum, normed } = isWritten
      ? writtenNorm(maker, hidden, delta, gamma)
      : fusedNorm(maker, hidden, delta, gamma);
    hidden = sum;
    return normed;
  };
  for (let layer = 0; layer < numLayers; layer++) {
    const prefix = `model.layers.${layer}`;
    if (options.residual === 'embedding' && delta !== undefined) delta = maker.add('Add', [delta, embedded]);
    const normed = normalize(`${prefix}.input_layernorm`);
    const attended = attend(layer, normed);
    delta = maker.linear(attended, `${prefix}.attn.o_proj`, options.numHeads * headDim, hiddenSize);
    delta =
      options.residual === 'parallel'
        ? maker.add('Add', [delta, mlp(maker, options, prefix, normed)])
        : mlp(maker, options, prefix, normalize(`${prefix}.post_attention_layernorm`));
    for (const part of ['key', 'value']) {
      maker.output(`present.${layer}.${part}`, maker.floatType, cacheDims('total_sequence_length'));
    }
  }
  const final = normalize('model.norm');
  const head = options.tied
    ? maker.add('MatMul', [final, maker.add('Transpose', [embedding], { perm: { ints: [1, 0] } })])
    : maker.linear(final, 'lm_head', hiddenSize, vocabSize);
  maker.add('Cast', [head], { to: ELEMENT.float }, { outputs: ['logits'] });
  return maker;
}

function mlp(maker: GraphMaker, { hiddenSize, intermediateSize }: ExportOptions, prefix: string, x: string): string {
  const gate = maker.linear(x, `${prefix}.mlp.gate_proj`, hiddenSize, intermediateSize);
  const up = maker.linear(x, `${prefix}.mlp.up_proj`, hiddenSize, intermediateSize);
  const activated = maker.add('Mul', [gate, maker.add('Sigmoid', [gate])]);
  return maker.linear(maker.add('Mul', [activated, up]), `${prefix}.mlp.down_proj`, intermediateSize, hiddenSize);
}

interface Normed {
  readonly sum: string;
  readonly normed: string;
}

function fusedNorm(maker: GraphMaker, hidden: string, delta: string | undefined, gamma: string): Normed {
  const epsilon = { float: 1e-5 };
  if (delta === undefined) {
    const attributes = { epsilon, axis: -1, stash_type: 1 };
    return { sum: hidden, normed: maker.add('SimplifiedLayerNormalization', [hidden, gamma], attributes) };
  }
  const [normed, sum] = [maker.name('normed'), maker.name('sum')];
  maker.microsoft('SkipSimplifiedLayerNormalization', [hidden, delta, gamma], { epsilon }, [normed, '', '', sum]);
  return { sum, normed };
}

/** In float32 whatever the graph's precision, as LlamaRMSNorm computes it. */
function writtenNorm(maker: GraphMaker, hidden: string, delta: string | undefined, gamma: string): Normed {
  const sum = delta === undefined ? hidden : maker.add('Add', [hidden, delta]);
  const isHalf = maker.floatType === ELEMENT.float16;
  const wide = isHalf ? maker.add('Cast', [sum], { to: ELEMENT.float }) : sum;
  const square = maker.add('Pow', [wide, maker.scalar(2, ELEMENT.float)]);
  const mean = maker.add('ReduceMean', [square, maker.ints([-1])]);
  const root = maker.add('Sqrt', [maker.add('Add', [mean, maker.scalar(1e-5, ELEMENT.float)])]);
  const scaled = maker.add('Mul', [wide, maker.add('Div', [maker.scalar(1, ELEMENT.float), root])]);
  const narrow = isHalf ? maker.add('Cast', [scaled], { to: ELEMENT.float16 }) : scaled;
  return { sum, normed: maker.add('Mul', [gamma, narrow]) };
}
