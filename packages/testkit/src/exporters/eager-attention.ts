/**
 * Owns attention written out as torch.onnx.export traces transformers' eager and sdpa attention: rotary angles from
 * position ids, rotate_half, the cache joined by Concat, repeat_kv, MatMul, mask, Softmax, MatMul.
 */

import { type AttentionWriter, causalBias, projections, repeatKv, toHeads } from './attention-pieces.ts';
import type { ExportForm, ExportOptions } from './export-options.ts';
import { ELEMENT, type GraphMaker } from './graph-maker.ts';

const THETA = 10000;

export function eagerAttention(
  maker: GraphMaker,
  options: ExportOptions,
  form: ExportForm & { readonly operator: 'eager' },
): AttentionWriter {
  const { numHeads, numKvHeads, headDim } = options;
  const half = headDim / 2;
  const mask = maskOf(maker, options, form);
  const [cos, sin] = form.alibi === true ? ['', ''] : angles(maker, half);
  const scale = 1 / Math.sqrt(headDim);
  const rotate = (x: string): string => {
    if (form.alibi === true) return x;
    const slice = (start: number, end: number): string =>
      maker.add('Slice', [x, maker.ints([start]), maker.ints([end]), maker.ints([3]), maker.ints([1])]);
    const turned = maker.add('Concat', [maker.add('Neg', [slice(half, 2 ** 53 - 1)]), slice(0, half)], { axis: -1 });
    return maker.add('Add', [maker.add('Mul', [x, cos]), maker.add('Mul', [turned, sin])]);
  };
  return (layer, normed) => {
    const [q, k, v] = projections(maker, options, layer, normed);
    let query = rotate(toHeads(maker, q, numHeads, headDim));
    const joined = [rotate(toHeads(maker, k, numKvHeads, headDim)), toHeads(maker, v, numKvHeads, headDim)].map(
      (x, i) => {
        const part = i === 0 ? 'key' : 'value';
        const names = { outputs: [`present.${layer}.${part}`] };
        return maker.add('Concat', [`past_key_values.${layer}.${part}`, x], { axis: -2 }, names);
      },
    );
    const [keys = '', values = ''] = joined.map((x) => repeatKv(maker, options, x));
    let turned = maker.add('Transpose', [keys], { perm: { ints: [0, 1, 3, 2] } });
    if (form.scaling === 'sdpa') {
      const root = maker.add('Sqrt', [tracedScale(maker, query)]);
      [query, turned] = [maker.add('Mul', [query, root]), maker.add('Mul', [turned, root])];
    }
    let scores = maker.add('MatMul', [query, turned]);
    if (form.scaling === 'mul') scores = maker.add('Mul', [scores, maker.scalar(scale)]);
    if (form.softcap !== undefined) {
      const tanh = maker.add('Tanh', [maker.add('Div', [scores, maker.scalar(form.softcap)])]);
      scores = maker.add('Mul', [tanh, maker.scalar(form.softcap)]);
    }
    scores =
      form.mask === 'add' ? maker.add('Add', [scores, mask]) : maker.add('Where', [mask, scores, maker.scalar(-65504)]);
    const isHalf = maker.floatType === ELEMENT.float16;
    const wide = isHalf ? maker.add('Cast', [scores], { to: ELEMENT.float }) : scores;
    let weights = maker.add('Softmax', [wide], { axis: -1 });
    if (isHalf) weights = maker.add('Cast', [weights], { to: ELEMENT.float16 });
    const output = maker.add('Transpose', [maker.add('MatMul', [weights, values])], { perm: { ints: [0, 2, 1, 3] } });
    return maker.add('Reshape', [output, rowsShape(maker, numHeads * headDim)]);
  };
}

/** cos and sin of inv_freq times position_ids, [batch, 1, tokens, headDim], computed in float32. */
function angles(maker: GraphMaker, half: number): [string, string] {
  const frequencies = Float64Array.from({ length: half }, (_, i) => THETA ** (-i / half));
  const inverse = maker.tensor('model.rotary_emb.inv_freq', ELEMENT.float, [1, half, 1], frequencies);
  const batch = maker.add('Gather', [maker.add('Shape', ['position_ids']), maker.ints([0])], { axis: 0 });
  // torch's expand(batch, -1, 1): -1, which ONNX does not know, is replaced by 1 where it stands.
  const wanted = maker.add('Concat', [batch, maker.ints([-1, 1])], { axis: 0 });
  const isKept = maker.add('Equal', [wanted, maker.ints([-1, -1, -1])]);
  const expanded = maker.add('Expand', [inverse, maker.add('Where', [isKept, maker.ints([1, 1, 1]), wanted])]);
  const rows = maker.add('Unsqueeze', ['position_ids', maker.ints([1])]);
  const product = maker.add('MatMul', [expanded, maker.add('Cast', [rows], { to: ELEMENT.float })]);
  const turned = maker.add('Transpose', [product], { perm: { ints: [0, 2, 1] } });
  const doubled = maker.add('Concat', [turned, turned], { axis: -1 });
  const finish = (f: string): string => {
    const value = maker.add(f, [doubled]);
    const narrow = maker.floatType === ELEMENT.float ? value : maker.add('Cast', [value], { to: maker.floatType });
    return maker.add('Unsqueeze', [narrow, maker.ints([1])]);
  };
  return [finish('Cos'), finish('Sin')];
}

/** 1 / sqrt(headDim), computed from the shape of Q as torch traces it. */
function tracedScale(maker: GraphMaker, query: string): string {
  const shape = maker.add('Shape', [query]);
  const width = maker.add('Slice', [shape, maker.ints([-1]), maker.ints([2 ** 53 - 1])]);
  const root = maker.add('Sqrt', [maker.add('Cast', [width], { to: ELEMENT.float })]);
  const scale = maker.add('Div', [maker.scalar(1, ELEMENT.float), root]);
  return maker.floatType === ELEMENT.float ? scale : maker.add('Cast', [scale], { to: maker.floatType });
}

/** [batch, tokens, width] from the shape of the token ids, as torch traces it. */
function rowsShape(maker: GraphMaker, width: number): string {
  const shape = maker.add('Shape', ['input_ids']);
  const sizes = [0, 1].map((axis) => {
    const size = maker.add('Gather', [shape, maker.ints([axis], [])], { axis: 0 });
    return maker.add('Unsqueeze', [size, maker.ints([0])]);
  });
  return maker.add('Concat', [...sizes, maker.ints([width])], { axis: 0 });
}

function maskOf(
  maker: GraphMaker,
  { numHeads }: ExportOptions,
  form: ExportForm & { readonly operator: 'eager' },
): string {
  const mask = causalBias(maker, { window: form.window }, form.mask === 'where');
  if (form.alibi !== true) return mask;
  // BLOOM and MPT: slope times the key's position, counted from the mask.
  const slopes = Float64Array.from({ length: numHeads }, (_, i) => 2 ** (-(8 * (i + 1)) / numHeads));
  const slope = maker.tensor('alibi.slopes', maker.floatType, [numHeads, 1, 1], slopes);
  const counted = maker.add('Sub', [maker.add('CumSum', ['attention_mask', maker.ints([1], [])]), maker.ints([1], [])]);
  const positions = maker.add('Cast', [maker.add('Unsqueeze', [counted, maker.ints([1, 2])])], { to: maker.floatType });
  return maker.add('Add', [mask, maker.add('Mul', [slope, positions])]);
}
