/**
 * Owns the attention of a Llama-shaped decoder in each of the forms in which exporters write it down.
 */

import { type AttentionWriter, causalBias, indexedMask, projections, repeatKv, toHeads } from './attention-pieces.ts';
import { eagerAttention } from './eager-attention.ts';
import type { ExportForm, ExportOptions } from './export-options.ts';
import { ELEMENT, type GraphMaker } from './graph-maker.ts';

type Form<Operator extends ExportForm['operator']> = ExportForm & { readonly operator: Operator };

const THETA = 10000;

export function attentionWriter(maker: GraphMaker, options: ExportOptions): AttentionWriter {
  const { form } = options;
  if (form.operator === 'gqa') return groupQuery(maker, options, form);
  if (form.operator === 'mha') return multiHead(maker, options, form);
  if (form.operator === 'onnx') return standard(maker, options, form);
  if (form.operator === 'eager') return eagerAttention(maker, options, form);
  throw new TypeError(`no Llama with ${form.operator}`);
}

interface Table {
  readonly dims: readonly number[];
  readonly values: Float64Array;
}

/** cos or sin of positions 0 to rows - 1, [rows, rotated / 2], of angles that are divided by `divisor`. */
function rotaryTable(f: (x: number) => number, rows: number, rotated: number, divisor = 1): Table {
  const half = rotated / 2;
  const angle = (i: number): number => (Math.floor(i / half) * THETA ** (-(i % half) / half)) / divisor;
  return { dims: [rows, half], values: Float64Array.from({ length: rows * half }, (_, i) => f(angle(i))) };
}

/** cos and sin of all positions, [contextLength, rotated / 2]. */
function rotaryTables(maker: GraphMaker, { contextLength }: ExportOptions, rotated: number): [string, string] {
  const table = (name: string, f: (x: number) => number): string => {
    const { dims, values } = rotaryTable(f, contextLength, rotated);
    return maker.tensor(name, maker.floatType, dims, values);
  };
  return [table('cos_cache', Math.cos), table('sin_cache', Math.sin)];
}

/** What the angles of long requests are divided by; a factor for each pair does not matter here. */
const LONG_DIVISOR = 4;

/** longrope: tables for long requests and others for short ones. Returns cos and sin, and what to look them up with. */
function chosenTables(
  maker: GraphMaker,
  { contextLength }: ExportOptions,
  rotated: number,
  { tokens: longAbove, by }: NonNullable<Form<'gqa'>['longAbove']>,
  totalLength: string,
): [cos: string, sin: string, positions: string] {
  const tables = (rows: number, divisor?: number): readonly [Table, Table] => [
    rotaryTable(Math.cos, rows, rotated, divisor),
    rotaryTable(Math.sin, rows, rotated, divisor),
  ];
  const [large, small] = [tables(contextLength, LONG_DIVISOR), tables(longAbove)];
  if (by === 'positions') {
    // For providers without If: tables joined, short rows first, and positions moved if the last of them is a long one's.
    const [cos = '', sin = ''] = ['cos_cache', 'sin_cache'].map((name, i) => {
      const values = Float64Array.from([...(small[i]?.values ?? []), ...(large[i]?.values ?? [])]);
      return maker.tensor(name, maker.floatType, [longAbove + contextLength, rotated / 2], values);
    });
    const limit = maker.ints([longAbove], []);
    const last = maker.add('ReduceMax', ['position_ids'], { keepdims: 0 });
    const isLong = maker.add('Cast', [maker.add('GreaterOrEqual', [last, limit])], { to: ELEMENT.int64 });
    return [cos, sin, maker.add('Add', ['position_ids', maker.add('Mul', [isLong, limit])])];
  }
  const asked =
    by === 'length'
      ? totalLength
      : maker.add('Gather', [maker.add('Shape', ['input_ids']), maker.ints([1], [])], { axis: 0 });
  const isLong = maker.add('Greater', [asked, maker.ints([longAbove], [])]);
  const branch = (label: string, [cos, sin]: readonly [Table, Table]) =>
    maker.constantBranch(`${label}_rope_caches_graph`, { [`cos_cache_${label}`]: cos, [`sin_cache_${label}`]: sin });
  const branches = { then_branch: { graph: branch('large', large) }, else_branch: { graph: branch('small', small) } };
  maker.add('If', [isLong], branches, { outputs: ['cos_cache', 'sin_cache'] });
  return ['cos_cache', 'sin_cache', 'position_ids'];
}

/** As the model builder of onnxruntime-genai and transformers.js's conversion write it. */
function groupQuery(maker: GraphMaker, options: ExportOptions, form: Form<'gqa'>): AttentionWriter {
  const { numHeads, numKvHeads, headDim, hiddenSize } = options;
  const { rotary = 'inside' } = form;
  const lengths = maker.add('ReduceSum', ['attention_mask', maker.ints([1])], { keepdims: 0 });
  const lessOne = maker.add('Sub', [lengths, maker.ints([1])]);
  const seqlens = maker.add('Cast', [lessOne], { to: ELEMENT.int32 });
  const totalShape = maker.add('Shape', ['attention_mask']);
  const total = maker.add('Gather', [totalShape, maker.ints([1], [])], { axis: 0 });
  const totalLength = maker.add('Cast', [total], { to: ELEMENT.int32 });
  const rotated = rotary === 'partial' ? headDim / 2 : headDim;
  const [cos, sin, positions] =
    form.longAbove === undefined
      ? [...rotaryTables(maker, options, rotated), 'position_ids']
      : chosenTables(maker, options, rotated, form.longAbove, total);
  const optional = {
    ...(form.localWindow === undefined ? {} : { local_window_size: form.localWindow }),
    ...(form.softcap === undefined ? {} : { softcap: { float: form.softcap } }),
    ...(form.scale === undefined ? {} : { scale: { float: form.scale } }),
    ...(form.sinks === 'smooth' ? { smooth_softmax: 1 } : {}),
  };
  return (layer, normed) => {
    let [query, key, value] = projections(maker, options, layer, normed);
    if (form.packed === true) {
      const width = (numHeads + 2 * numKvHeads) * headDim;
      query = maker.linear(normed, `model.layers.${layer}.attn.qkv_proj`, hiddenSize, width);
      [key, value] = ['', ''];
    }
    if (rotary === 'before') {
      const rotate = (x: string): string =>
        maker.microsoft('RotaryEmbedding', [x, positions, cos, sin], { interleaved: 0 });
      [query, key] = [rotate(query), rotate(key)];
    }
    const caches = ['key', 'value'].map((part) => `past_key_values.${layer}.${part}`);
    const tables = rotary === 'before' ? ['', ''] : [cos, sin];
    const sinks =
      form.sinks === 'head' ? ['', '', maker.weight(`model.layers.${layer}.attn.sinks`, [numHeads], 2)] : [];
    return maker.microsoft(
      'GroupQueryAttention',
      [query, key, value, ...caches, seqlens, totalLength, ...tables, ...sinks],
      {
        num_heads: numHeads,
        kv_num_heads: numKvHeads,
        do_rotary: rotary === 'before' ? 0 : 1,
        rotary_interleaved: rotary === 'interleaved' ? 1 : 0,
        ...optional,
      },
      [maker.name('attn'), `present.${layer}.key`, `present.${layer}.value`],
    );
  };
}

/** Rotary embedding nodes and MultiHeadAttention, as the model builder and ONNX Runtime's optimizer write it. */
function multiHead(maker: GraphMaker, options: ExportOptions, form: Form<'mha'>): AttentionWriter {
  const { numHeads, numKvHeads, headDim } = options;
  const [cos, sin] = rotaryTables(maker, options, headDim);
  const bias = causalBias(maker, {});
  return (layer, normed) => {
    const [q, k, value] = projections(maker, options, layer, normed);
    const rotate = (x: string): string =>
      maker.microsoft('RotaryEmbedding', [x, 'position_ids', cos, sin], { interleaved: 0 });
    const [query, key] = [rotate(q), rotate(k)];
    const past = ['key', 'value'].map((part) => `past_key_values.${layer}.${part}`);
    const present = ['key', 'value'].map((part) => `present.${layer}.${part}`);
    const attributes = { num_heads: numHeads };
    const output = maker.name('attn');
    if (form.joined !== true) {
      return maker.microsoft('MultiHeadAttention', [query, key, value, '', '', bias, ...past], attributes, [
        output,
        ...present,
      ]);
    }
    const [keys = '', values = ''] = [key, value].map((x, i) => {
      const heads = toHeads(maker, x, numKvHeads, headDim);
      const all = maker.add('Concat', [past[i] ?? '', heads], { axis: 2 }, { outputs: [present[i] ?? ''] });
      const turned = maker.add('Transpose', [repeatKv(maker, options, all)], { perm: { ints: [0, 2, 1, 3] } });
      return maker.add('Reshape', [turned, maker.ints([0, 0, numHeads * headDim])]);
    });
    return maker.microsoft('MultiHeadAttention', [query, keys, values, '', '', bias], attributes, [output]);
  };
}

/** ai.onnx Attention, as torch.onnx.export writes scaled_dot_product_attention from opset 23 on. */
function standard(maker: GraphMaker, options: ExportOptions, form: Form<'onnx'>): AttentionWriter {
  const { numHeads, numKvHeads, headDim } = options;
  const [cos, sin] = rotaryTables(maker, options, headDim);
  const mask =
    form.mask === 'causal'
      ? ''
      : form.mask === 'indexed'
        ? indexedMask(maker)
        : causalBias(maker, {}, form.mask === 'bool');
  const widths = form.rank === 3 ? { q_num_heads: numHeads, kv_num_heads: numKvHeads } : {};
  return (layer, normed) => {
    const [q, k, v] = projections(maker, options, layer, normed);
    const rotate = (x: string, heads: number): string =>
      maker.add('RotaryEmbedding', [x, cos, sin, 'position_ids'], { num_heads: heads });
    const parts = [rotate(q, numHeads), rotate(k, numKvHeads), v];
    const laid =
      form.rank === 3 ? parts : parts.map((x, i) => toHeads(maker, x, i === 0 ? numHeads : numKvHeads, headDim));
    const past = ['key', 'value'].map((part) => `past_key_values.${layer}.${part}`);
    const present = ['key', 'value'].map((part) => `present.${layer}.${part}`);
    const attributes = { ...widths, is_causal: form.mask === 'causal' ? 1 : 0 };
    let output: string;
    if (form.joined === true) {
      const [query = '', ...new_] = laid;
      const all = new_.map((x, i) =>
        maker.add('Concat', [past[i] ?? '', x], { axis: 2 }, { outputs: [present[i] ?? ''] }),
      );
      output = maker.add('Attention', [query, ...all, mask], attributes);
    } else {
      output = maker.add('Attention', [...laid, mask, ...past], attributes, {
        outputs: [maker.name('attn'), ...present],
      });
    }
    if (form.rank === 3) return output;
    const turned = maker.add('Transpose', [output], { perm: { ints: [0, 2, 1, 3] } });
    return maker.add('Reshape', [turned, maker.ints([0, 0, numHeads * headDim])]);
  };
}
