/**
 * Owns a GPT-2-shaped decoder as exporters write it down: com.microsoft Attention with a packed past (ONNX Runtime's
 * GPT-2 conversion), or written out (optimum), also behind the If of merged decoders.
 */

import { toHeads } from './attention-pieces.ts';
import type { ExportOptions } from './export-options.ts';
import { ELEMENT, GraphMaker } from './graph-maker.ts';

export function makeGpt2(options: ExportOptions): GraphMaker {
  const { hiddenSize, vocabSize, numLayers, numHeads, headDim, contextLength, form } = options;
  if (form.operator !== 'gpt2') throw new TypeError('another form');
  const maker = new GraphMaker(options.precision, options.seed);
  maker.input('input_ids', ELEMENT.int64, ['batch_size', 'sequence_length']);
  maker.input('attention_mask', ELEMENT.int64, ['batch_size', 'total_sequence_length']);
  if (form.merged === true) maker.input('use_cache_branch', ELEMENT.bool, [1]);
  if (form.fused) maker.input('position_ids', ELEMENT.int64, ['batch_size', 'sequence_length']);
  const cacheDims = (tokens: string): (number | string)[] =>
    form.fused ? [2, 'batch_size', numHeads, tokens, headDim] : ['batch_size', numHeads, tokens, headDim];
  const cacheNames = (layer: number, kind: 'past' | 'present'): string[] =>
    form.fused
      ? [`${kind}_${layer}`]
      : ['key', 'value'].map((part) => `${kind === 'past' ? 'past_key_values' : kind}.${layer}.${part}`);
  for (let layer = 0; layer < numLayers; layer++) {
    for (const name of cacheNames(layer, 'past')) maker.input(name, maker.floatType, cacheDims('past_sequence_length'));
  }
  maker.output('logits', maker.floatType, ['batch_size', 'sequence_length', vocabSize]);
  for (let layer = 0; layer < numLayers; layer++) {
    for (const name of cacheNames(layer, 'present')) maker.output(name, maker.floatType, cacheDims('total'));
  }
  const positions = form.fused ? 'position_ids' : countedPositions(maker);
  const embedding = maker.weight('transformer.wte.weight', [vocabSize, hiddenSize], 2);
  const table = maker.weight('transformer.wpe.weight', [contextLength, hiddenSize], 1);
  let hidden = maker.add('Add', [
    maker.add('Gather', [embedding, 'input_ids']),
    maker.add('Gather', [table, positions]),
  ]);
  const norm = (name: string): string =>
    maker.add(
      'LayerNormalization',
      [hidden, maker.weight(`${name}.weight`, [hiddenSize], 0.5, 1), maker.weight(`${name}.bias`, [hiddenSize], 0.5)],
      { axis: -1, epsilon: { float: 1e-5 } },
    );
  const linear = (x: string, name: string, inputs: number, outputs: number): string =>
    conv1d(maker, x, name, inputs, outputs);
  for (let layer = 0; layer < numLayers; layer++) {
    const prefix = `transformer.h.${layer}`;
    const normed = norm(`${prefix}.ln_1`);
    const attended = form.fused
      ? maker.microsoft(
          'Attention',
          [
            normed,
            maker.weight(`${prefix}.attn.c_attn.weight`, [hiddenSize, 3 * hiddenSize], 4 / Math.sqrt(hiddenSize)),
            maker.weight(`${prefix}.attn.c_attn.bias`, [3 * hiddenSize], 0.5),
            '',
            `past_${layer}`,
          ],
          { num_heads: numHeads, unidirectional: 1 },
          [maker.name('attn'), `present_${layer}`],
        )
      : writtenAttention(maker, options, layer, linear(normed, `${prefix}.attn.c_attn`, hiddenSize, 3 * hiddenSize));
    hidden = maker.add('Add', [linear(attended, `${prefix}.attn.c_proj`, hiddenSize, hiddenSize), hidden]);
    const inner = linear(norm(`${prefix}.ln_2`), `${prefix}.mlp.c_fc`, hiddenSize, 2 * hiddenSize);
    const activated = maker.add('Mul', [inner, maker.add('Sigmoid', [inner])]);
    hidden = maker.add('Add', [hidden, linear(activated, `${prefix}.mlp.c_proj`, 2 * hiddenSize, hiddenSize)]);
  }
  const head = maker.add('Transpose', [embedding], { perm: { ints: [1, 0] } });
  maker.add('MatMul', [norm('transformer.ln_f'), head], {}, { outputs: ['logits'] });
  return maker;
}

/** Positions that the graph counts from its mask, as optimum's GPT-2 without position_ids has them. */
function countedPositions(maker: GraphMaker): string {
  const counted = maker.add('Sub', [maker.add('CumSum', ['attention_mask', maker.ints([1], [])]), maker.ints([1], [])]);
  const shape = maker.add('Shape', ['input_ids']);
  const tokens = maker.add('Gather', [shape, maker.ints([1])], { axis: 0 });
  const start = maker.add('Neg', [tokens]);
  return maker.add('Slice', [counted, start, maker.ints([2 ** 53 - 1]), maker.ints([1])]);
}

/** Conv1D: rows are flattened for Gemm and brought back. */
function conv1d(maker: GraphMaker, x: string, name: string, inputs: number, outputs: number): string {
  const weight = maker.weight(`${name}.weight`, [inputs, outputs], 4 / Math.sqrt(inputs));
  const bias = maker.weight(`${name}.bias`, [outputs], 0.5);
  const shape = maker.add('Shape', [x]);
  const leading = maker.add('Slice', [shape, maker.ints([0]), maker.ints([-1])]);
  const rows = maker.add('Reshape', [x, maker.ints([-1, inputs])]);
  const product = maker.add('Gemm', [rows, weight, bias]);
  return maker.add('Reshape', [product, maker.add('Concat', [leading, maker.ints([outputs])], { axis: 0 })]);
}

/** The causal mask is a slice of a square of Booleans; scores are divided by the root of the head size. */
function writtenAttention(maker: GraphMaker, options: ExportOptions, layer: number, packed: string): string {
  const { hiddenSize, numHeads, headDim, contextLength } = options;
  const parts = ['q', 'k', 'v'].map((part) => maker.name(part));
  maker.add('Split', [packed, maker.ints([hiddenSize, hiddenSize, hiddenSize])], { axis: 2 }, { outputs: parts });
  const [query = '', ...own] = parts.map((part) => toHeads(maker, part, numHeads, headDim));
  const [keys = '', values = ''] = own.map((x, i) => {
    const part = i === 0 ? 'key' : 'value';
    return maker.add(
      'Concat',
      [`past_key_values.${layer}.${part}`, x],
      { axis: -2 },
      { outputs: [`present.${layer}.${part}`] },
    );
  });
  const turned = maker.add('Transpose', [keys], { perm: { ints: [0, 1, 3, 2] } });
  const scores = maker.add('Div', [maker.add('MatMul', [query, turned]), maker.scalar(Math.sqrt(headDim))]);
  const square = maker.tensor(
    `transformer.h.${layer}.attn.bias`,
    ELEMENT.bool,
    [1, 1, contextLength, contextLength],
    Uint8Array.from({ length: contextLength ** 2 }, (_, i) =>
      i % contextLength <= Math.floor(i / contextLength) ? 1 : 0,
    ),
  );
  const size = (x: string): string => maker.add('Gather', [maker.add('Shape', [x]), maker.ints([2])], { axis: 0 });
  const [tokens, total] = [size(query), size(keys)];
  const past = maker.add('Sub', [total, tokens]);
  const rows = maker.add('Slice', [square, past, total, maker.ints([2])]);
  const visible = maker.add('Slice', [rows, maker.ints([0]), total, maker.ints([3])]);
  const masked = maker.add('Where', [visible, scores, maker.scalar(-65504)]);
  const output = maker.add('MatMul', [maker.add('Softmax', [masked], { axis: -1 }), values]);
  const heads = maker.add('Transpose', [output], { perm: { ints: [0, 2, 1, 3] } });
  return maker.add('Reshape', [heads, maker.ints([0, 0, hiddenSize])]);
}
