/**
 * Owns the evaluation of operators that mix elements: products, normalizations, reductions, softmax, attention. Of those
 * that read weight matrices only the shape is ever needed.
 */
import { isFloating, TYPE } from './element-types.ts';
import type { Operands, Rule } from './operands.ts';
import { broadcast, broadcastStrides, gatherStrided, lazyValue, shapeOnly, sizeOf, type Value } from './values.ts';

const axisOf = (axis: number, rank: number): number => (axis < 0 ? axis + rank : axis);

/** [.., M, K] x [.., K, N]. */
function product(a: Value, b: Value, dataType: number): Value {
  const left = a.dims.length === 1 ? [1, ...a.dims] : a.dims;
  const right = b.dims.length === 1 ? [...b.dims, 1] : b.dims;
  const [rows = 1, inner = 1] = left.slice(-2);
  const [rightInner = 1, columns = 1] = right.slice(-2);
  if (inner !== rightInner) throw new RangeError(`[${a.dims}] x [${b.dims}] do not fit each other`);
  const batch = broadcast(left.slice(0, -2), right.slice(0, -2));
  const dims = [...batch, rows, columns];
  const squeezed = dims.filter((_, i) => !(i === dims.length - 2 && a.dims.length === 1));
  return lazyValue(dataType, b.dims.length === 1 ? squeezed.slice(0, -1) : squeezed, () => {
    const [x, y] = [a.numbers(), b.numbers()];
    if (x === null || y === null) return null;
    const ls = [...batch, rows, inner];
    const rs = [...batch, inner, columns];
    const l = gatherStrided(x, ls, broadcastStrides(left, ls));
    const r = gatherStrided(y, rs, broadcastStrides(right, rs));
    const out = new Float64Array(sizeOf(dims));
    for (let i = 0; i < sizeOf(batch) * rows; i++) {
      const matrix = Math.floor(i / rows) * inner * columns;
      for (let k = 0; k < inner; k++) {
        const factor = l[i * inner + k]!;
        if (factor === 0) continue;
        for (let j = 0; j < columns; j++) out[i * columns + j]! += factor * r[matrix + k * columns + j]!;
      }
    }
    return out;
  });
}

const gemm: Rule = (operands) => {
  const flip = (i: number, name: string): Value => {
    const x = operands.in(i);
    return operands.int(name, 0) === 1 ? shapeOnly(x.dataType, x.dims.toReversed()) : shapeOnly(x.dataType, x.dims);
  };
  return [product(flip(0, 'transA'), flip(1, 'transB'), operands.in(0).dataType)];
};

/** Quantized weights [N, ..]: the input's last dimension becomes N. */
const packedProduct: Rule = (operands) => {
  const x = operands.in(0);
  return [shapeOnly(x.dataType, x.dims.with(-1, operands.int('N', 0)))];
};

const integerProduct =
  (dataType: number): Rule =>
  (operands) => [product(shapeOnly(0, operands.in(0).dims), shapeOnly(0, operands.in(1).dims), dataType)];

/** com.microsoft.FusedMatMul. */
const fusedProduct: Rule = (operands) => {
  const flip = (x: Value, name: string): Value => {
    if (operands.int(name, 0) !== 1) return shapeOnly(x.dataType, x.dims);
    return shapeOnly(x.dataType, [...x.dims.slice(0, -2), x.dims.at(-1) ?? 1, x.dims.at(-2) ?? 1]);
  };
  return [product(flip(operands.in(0), 'transA'), flip(operands.in(1), 'transB'), operands.in(0).dataType)];
};

/** The first output has the input's shape; so have the others that this kind of operator may have. */
const normalization: Rule = (operands) => {
  const x = operands.in(0);
  return operands.node.outputs.map(() => shapeOnly(x.dataType, x.dims));
};

function reduction(
  start: number,
  step: (sum: number, x: number) => number,
  finish = (sum: number, _n: number) => sum,
): Rule {
  return (operands) => {
    const x = operands.in(0);
    const given = operands.numbersOf('axes', 1);
    const isNoop = operands.int('noop_with_empty_axes', 0) === 1 && (given ?? []).length === 0;
    const axes = (given === undefined || given.length === 0) && !isNoop ? x.dims.map((_, i) => i) : (given ?? []);
    const reduced = new Set(axes.map((axis) => axisOf(axis, x.dims.length)));
    const kept = x.dims.map((dim, i) => (reduced.has(i) ? 1 : dim));
    const dims = operands.int('keepdims', 1) === 1 ? kept : kept.filter((_, i) => !reduced.has(i));
    return [
      lazyValue(x.dataType, dims, () => {
        const numbers = x.numbers();
        if (numbers === null) return null;
        const out = new Float64Array(sizeOf(kept)).fill(start);
        const at = gatherStrided(
          Float64Array.from(out, (_, i) => i),
          x.dims,
          broadcastStrides(kept, x.dims),
        );
        for (const [i, value] of numbers.entries()) out[at[i]!] = step(out[at[i]!]!, value);
        return out.map((sum) => finish(sum, numbers.length / out.length));
      }),
    ];
  };
}

const softmax: Rule = (operands) => {
  const x = operands.in(0);
  const axis = axisOf(operands.int('axis', operands.opset >= 13 ? -1 : 1), x.dims.length);
  const width = operands.opset >= 13 ? x.dims[axis]! : sizeOf(x.dims.slice(axis));
  return [
    lazyValue(x.dataType, x.dims, () => {
      const out = x.numbers()?.slice() ?? null;
      if (out === null || (operands.opset >= 13 && axis !== x.dims.length - 1)) return null;
      for (let start = 0; start < out.length; start += width) {
        const row = out.subarray(start, start + width);
        const maximum = row.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
        for (const [i, score] of row.entries()) row[i] = Math.exp(score - maximum);
        const sum = row.reduce((a, b) => a + b, 0);
        for (const i of row.keys()) row[i]! /= sum;
      }
      return out;
    }),
  ];
};

const quantize: Rule = (operands) => {
  const x = operands.in(0);
  const dataType = operands.optional(2)?.dataType ?? TYPE.uint8;
  return [shapeOnly(dataType, x.dims), shapeOnly(TYPE.float, []), shapeOnly(dataType, [])];
};

/** com.microsoft.GatherBlockQuantized: rows of a table of 4 or 8 bits. */
const quantizedGather: Rule = (operands) => {
  const [table, indices, scales] = [operands.in(0), operands.in(1), operands.in(2)];
  const bits = operands.int('bits', 4);
  const packs = table.dataType === TYPE.uint8 && bits === 4 ? 2 : 1;
  return [shapeOnly(scales.dataType, [...indices.dims, ...table.dims.slice(1, -1), (table.dims.at(-1) ?? 1) * packs])];
};

/** com.microsoft.GroupQueryAttention, with the keys and values after this step. */
const groupQueryAttention: Rule = (operands) => {
  const [query, past] = [operands.in(0), operands.optional(3)];
  const [numHeads, numKvHeads] = [operands.int('num_heads', 1), operands.int('kv_num_heads', 1)];
  const [batch = 1, tokens = 1, width = 1] = query.dims;
  const isPacked = operands.optional(1) === undefined;
  const headDim = isPacked ? width / (numHeads + 2 * numKvHeads) : width / numHeads;
  const present = [batch, numKvHeads, (past?.dims[2] ?? 0) + tokens, headDim];
  const kvType = past?.dataType ?? query.dataType;
  const values = [shapeOnly(query.dataType, [batch, tokens, numHeads * headDim])];
  return [...values, shapeOnly(kvType, present), shapeOnly(kvType, present)];
};

/** com.microsoft.MultiHeadAttention: query [B, S, N], value [B, L, N], past [B, heads, P, headDim]. */
const multiHeadAttention: Rule = (operands) => {
  const [query, key, value, past] = [operands.in(0), operands.optional(1), operands.optional(2), operands.optional(6)];
  if (query.dims.length !== 3 || key?.dims.length !== 3 || value?.dims.length !== 3) {
    throw new TypeError('packed or cross attention is not supported');
  }
  const heads = operands.int('num_heads', 1);
  const present = [query.dims[0]!, heads, key.dims[1]! + (past?.dims[2] ?? 0), (key.dims[2] ?? 1) / heads];
  const output = shapeOnly(query.dataType, query.dims.with(-1, value.dims[2]!));
  return [output, shapeOnly(query.dataType, present), shapeOnly(query.dataType, present)];
};

/** com.microsoft.Attention: input [B, S, N], weight [N, 3 W], past [2, B, heads, P, headDim]. */
const packedAttention: Rule = (operands) => {
  const [input, weight, past] = [operands.in(0), operands.in(1), operands.optional(4)];
  const [batch = 1, tokens = 1] = input.dims;
  const width = (operands.ints('qkv_hidden_sizes') ?? []).at(-1) ?? (weight.dims[1] ?? 3) / 3;
  const heads = operands.int('num_heads', 1);
  const present = [2, batch, heads, tokens + (past?.dims[3] ?? 0), width / heads];
  return [shapeOnly(input.dataType, [batch, tokens, width]), shapeOnly(input.dataType, present)];
};

/** ai.onnx Attention: Q, K, V of rank 3 or 4, past [B, kvHeads, P, headDim]. */
const attention: Rule = (operands) => {
  const [query, key, value, past] = [operands.in(0), operands.in(1), operands.in(2), operands.optional(4)];
  const isFlat = query.dims.length === 3;
  const [heads, kvHeads] = isFlat
    ? [operands.int('q_num_heads', 1), operands.int('kv_num_heads', 1)]
    : [query.dims[1]!, key.dims[1]!];
  const headDim = isFlat ? key.dims[2]! / kvHeads : key.dims[3]!;
  const valueDim = isFlat ? value.dims[2]! / kvHeads : value.dims[3]!;
  const total = (past?.dims[2] ?? 0) + (isFlat ? key.dims[1]! : key.dims[2]!);
  const batch = query.dims[0]!;
  return [
    shapeOnly(query.dataType, query.dims.with(-1, isFlat ? heads * valueDim : valueDim)),
    shapeOnly(key.dataType, [batch, kvHeads, total, headDim]),
    shapeOnly(value.dataType, [batch, kvHeads, total, valueDim]),
  ];
};

const topK: Rule = (operands) => {
  const x = operands.in(0);
  const dims = x.dims.with(axisOf(operands.int('axis', -1), x.dims.length), operands.numbers(1)[0] ?? 1);
  return [shapeOnly(x.dataType, dims), shapeOnly(TYPE.int64, dims)];
};

function first(operands: Operands): Value[] {
  return [shapeOnly(operands.in(0).dataType, operands.in(0).dims)];
}

export const LINEAR_RULES: Readonly<Record<string, Rule>> = {
  MatMul: (operands) => [product(operands.in(0), operands.in(1), operands.in(0).dataType)],
  Gemm: gemm,
  MatMulInteger: integerProduct(TYPE.int32),
  'com.microsoft.MatMulIntegerToFloat': integerProduct(TYPE.float),
  'com.microsoft.DynamicQuantizeMatMul': integerProduct(TYPE.float),
  'com.microsoft.MatMulNBits': packedProduct,
  'com.microsoft.MatMulBnb4': packedProduct,
  'com.microsoft.FusedMatMul': fusedProduct,
  'com.microsoft.GatherBlockQuantized': quantizedGather,
  DynamicQuantizeLinear: quantize,
  QuantizeLinear: quantize,
  DequantizeLinear: (operands) => {
    const scale = operands.in(1).dataType;
    return [shapeOnly(isFloating(scale) ? scale : TYPE.float, operands.in(0).dims)];
  },
  LayerNormalization: normalization,
  RMSNormalization: normalization,
  SimplifiedLayerNormalization: normalization,
  LpNormalization: normalization,
  'com.microsoft.SimplifiedLayerNormalization': normalization,
  'com.microsoft.SkipLayerNormalization': normalization,
  'com.microsoft.SkipSimplifiedLayerNormalization': normalization,
  'com.microsoft.MoE': first,
  'com.microsoft.QMoE': first,
  'com.microsoft.RotaryEmbedding': first,
  RotaryEmbedding: first,
  ReduceMean: reduction(
    0,
    (sum, x) => sum + x,
    (sum, n) => sum / n,
  ),
  ReduceSum: reduction(0, (sum, x) => sum + x),
  ReduceProd: reduction(1, (sum, x) => sum * x),
  ReduceMax: reduction(Number.NEGATIVE_INFINITY, Math.max),
  ReduceMin: reduction(Number.POSITIVE_INFINITY, Math.min),
  ReduceSumSquare: reduction(0, (sum, x) => sum + x * x),
  ReduceL2: reduction(0, (sum, x) => sum + x * x, Math.sqrt),
  Softmax: softmax,
  TopK: topK,
  'com.microsoft.GroupQueryAttention': groupQueryAttention,
  'com.microsoft.MultiHeadAttention': multiHeadAttention,
  'com.microsoft.Attention': packedAttention,
  Attention: attention,
  // What an attention becomes when it is found (attention-site.ts): the output is as wide as the query.
  'lamina.Attention': first,
};
