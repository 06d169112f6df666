/**
 * Owns the pieces of attention that several forms share: projections, head layout, masks, repeated KV heads.
 */
import type { ExportOptions } from './export-options.ts';
import { ELEMENT, type GraphMaker } from './graph-maker.ts';

/** Adds the attention of a layer, from its normalized input to what goes into the output projection. */
export type AttentionWriter = (layer: number, normed: string) => string;

/** Q, K and V rows, [batch, tokens, width]. */
export function projections(
  maker: GraphMaker,
  { hiddenSize, numHeads, numKvHeads, headDim }: ExportOptions,
  layer: number,
  normed: string,
): [string, string, string] {
  const project = (part: string, heads: number): string =>
    maker.linear(normed, `model.layers.${layer}.attn.${part}_proj`, hiddenSize, heads * headDim);
  return [project('q', numHeads), project('k', numKvHeads), project('v', numKvHeads)];
}

/** The causal mask of attention_mask, [batch, 1, tokens, total], 0 or the least number of the type. */
export function causalBias(
  maker: GraphMaker,
  options: { readonly window?: number | undefined },
  isBoolean = false,
): string {
  const shape = (x: string, axis: number): string =>
    maker.add('Gather', [maker.add('Shape', [x]), maker.ints([axis], [])], { axis: 0 });
  const [tokens, total] = [shape('input_ids', 1), shape('attention_mask', 1)];
  const past = maker.add('Sub', [total, tokens]);
  const one = maker.ints([1], []);
  const rows = maker.add('Unsqueeze', [maker.add('Range', [past, total, one]), maker.ints([1])]);
  const columns = maker.add('Unsqueeze', [maker.add('Range', [maker.ints([0], []), total, one]), maker.ints([0])]);
  let isHidden = maker.add('Greater', [columns, rows]);
  if (options.window !== undefined) {
    const first = maker.add('Sub', [rows, maker.ints([options.window], [])]);
    isHidden = maker.add('Or', [isHidden, maker.add('LessOrEqual', [columns, first])]);
  }
  const padding = maker.add('Unsqueeze', ['attention_mask', maker.ints([1, 2])]);
  const isPadded = maker.add('Equal', [padding, maker.ints([0], [])]);
  const hides = maker.add('Or', [maker.add('Unsqueeze', [isHidden, maker.ints([0, 1])]), isPadded]);
  if (isBoolean) return maker.add('Not', [hides]);
  const least = maker.floatType === ELEMENT.float16 ? -65504 : -3.4028234663852886e38;
  return maker.add('Where', [hides, maker.scalar(least), maker.scalar(0)]);
}

/** The same, Boolean, from indices of batch, query and key that are broadcast against each other. */
export function indexedMask(maker: GraphMaker): string {
  const size = (x: string, axis: number): string =>
    maker.add('Gather', [maker.add('Shape', [x]), maker.ints([axis], [])], { axis: 0 });
  const [batch, tokens, total] = [size('input_ids', 0), size('input_ids', 1), size('attention_mask', 1)];
  const [zero, one] = [maker.ints([0], []), maker.ints([1], [])];
  const range = (start: string, end: string, axes: readonly number[]): string =>
    maker.add('Unsqueeze', [maker.add('Range', [start, end, one]), maker.ints(axes)]);
  const batches = range(zero, batch, [1, 2, 3]);
  const queries = range(maker.add('Sub', [total, tokens]), total, [0, 1, 3]);
  const keys = range(zero, total, [0, 1, 2]);
  const isCausal = maker.add('LessOrEqual', [keys, queries]);
  // attention_mask[batches, keys]: torch.onnx.export writes indexing by several tensors as GatherND.
  const sizes = [batch, one, one, total].map((each) => maker.add('Unsqueeze', [each, maker.ints([0])]));
  const shape = maker.add('Concat', sizes, { axis: 0 });
  const indices = [batches, keys].map((each) =>
    maker.add('Unsqueeze', [maker.add('Expand', [each, shape]), maker.ints([-1])]),
  );
  const isKept = maker.add('Cast', ['attention_mask'], { to: ELEMENT.bool });
  const isVisible = maker.add('GatherND', [isKept, maker.add('Concat', indices, { axis: -1 })], { batch_dims: 0 });
  return maker.add('And', [isCausal, isVisible]);
}

/** Repeats KV heads [batch, kvHeads, total, headDim] for the query heads that share them, as torch traces repeat_kv. */
export function repeatKv(maker: GraphMaker, { numHeads, numKvHeads, headDim }: ExportOptions, x: string): string {
  if (numHeads === numKvHeads) return x;
  const shape = maker.add('Shape', [x]);
  const [batch, total] = [0, 2].map((axis) => maker.add('Gather', [shape, maker.ints([axis])], { axis: 0 }));
  const expanded = maker.add(
    'Concat',
    [batch ?? '', maker.ints([numKvHeads, numHeads / numKvHeads]), total ?? '', maker.ints([headDim])],
    { axis: 0 },
  );
  const wide = maker.add('Expand', [maker.add('Unsqueeze', [x, maker.ints([2])]), expanded]);
  const flat = maker.add('Concat', [batch ?? '', maker.ints([numHeads]), total ?? '', maker.ints([headDim])], {
    axis: 0,
  });
  return maker.add('Reshape', [wide, flat]);
}

/** Rows [batch, tokens, heads * headDim] to [batch, heads, tokens, headDim]. */
export function toHeads(maker: GraphMaker, x: string, heads: number, headDim: number): string {
  const split = maker.add('Reshape', [x, maker.ints([0, 0, heads, headDim])]);
  return maker.add('Transpose', [split], { perm: { ints: [0, 2, 1, 3] } });
}
