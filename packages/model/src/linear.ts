/**
 * Owns how a stored weight is used: products with matrices, products with tables (the LM head) and table lookups, as
 * the operators that the weight's storage needs. Nothing else knows how weights are stored.
 *
 * Invariants
 * 1. Inputs and outputs are float32 whatever the storage.
 * 2. What only depends on weights (casts, joins, transposes) is nodes on initializers of the same graph, which ONNX
 *    Runtime folds when it loads the graph: no step pays for it.
 */
import type { GraphPiece } from './graph-piece.ts';
import { FLOAT32_TYPE, MICROSOFT_DOMAIN, node } from './onnx.ts';
import { BLOCK_SIZE, type QuantizedStorage, type StoredTensor, type Weight } from './weight.ts';

/** MatMulNBits: activations are quantized to int8 too, per row and block. */
const ACCURACY_LEVEL = 4;

/** `input` [.., K] times `weight` [K, N] (+ `bias` [N]). Returns the name of the result, `prefix.label`. */
export function addLinear(
  { piece, prefix }: { readonly piece: GraphPiece; readonly prefix: string },
  label: string,
  input: string,
  weight: Weight,
  bias: Weight | null,
): string {
  const output = `${prefix}.${label}`;
  const product = bias === null ? output : `${output}.product`;
  const { storage } = weight;
  if (storage.kind === 'quantized') addQuantizedProduct(piece, storage, input, product);
  else piece.add(node('MatMul', [input, denseMatrix(piece, weight)], [product]));
  if (bias !== null) piece.add(node('Add', [product, piece.weight(bias)], [output]));
  return output;
}

/** Rows `indices` [..] of `table` [rows, width]: [.., width]. */
export function addLookup(piece: GraphPiece, table: Weight, indices: string, output: string): void {
  const { storage } = table;
  if (storage.kind === 'quantized') {
    const { bits, rows, values, scales } = storage;
    const inputs = [piece.stored(values, `${values.name}.rows`, [rows, values.byteLength / rows]), indices];
    inputs.push(piece.stored(scales));
    const attributes = { gather_axis: 0, quantize_axis: 1, block_size: BLOCK_SIZE, bits };
    piece.add(node('GatherBlockQuantized', inputs, [output], attributes, MICROSOFT_DOMAIN));
    return;
  }
  const tensor = onlyTensor(table);
  // The looked up rows are cast, not the table: it stays as small as it is stored.
  const gathered = tensor.type === 'float32' ? output : `${output}.stored`;
  piece.add(node('Gather', [piece.stored(tensor), indices], [gathered]));
  if (gathered !== output) piece.add(node('Cast', [gathered], [output], { to: FLOAT32_TYPE }));
}

/** `input` [R, width] times the transpose of `table` [rows, width]: [R, rows]. */
export function addTableProduct(piece: GraphPiece, table: Weight, input: string, output: string): void {
  const { storage } = table;
  if (storage.kind === 'quantized') {
    addQuantizedProduct(piece, storage, input, output);
    return;
  }
  // The table lies as rows, so that a tied head is stored once; Gemm packs it transposed.
  piece.add(node('Gemm', [input, float32(piece, onlyTensor(table))], [output], { transB: 1 }));
}

/** The matrix as a float32 value [K, N]. */
function denseMatrix(piece: GraphPiece, weight: Weight): string {
  const { storage, name } = weight;
  if (storage.kind !== 'in_place') return float32(piece, onlyTensor(weight));
  const parts = storage.tensors.map((tensor) => float32(piece, tensor));
  const [first = ''] = parts;
  if (!storage.transposed) return first;
  const joined = parts.length === 1 ? first : `${name}.joined`;
  if (parts.length > 1) piece.add(node('Concat', parts, [joined], { axis: 0 }));
  piece.add(node('Transpose', [joined], [name], { perm: { ints: [1, 0] } }));
  return name;
}

function float32(piece: GraphPiece, tensor: StoredTensor): string {
  const name = piece.stored(tensor);
  if (tensor.type === 'float32') return name;
  piece.add(node('Cast', [name], [`${name}.float32`], { to: FLOAT32_TYPE }));
  return `${name}.float32`;
}

function onlyTensor({ name, storage }: Weight): StoredTensor {
  if (storage.kind === 'dense') return storage.tensor;
  const tensor = storage.kind === 'in_place' ? storage.tensors[0] : undefined;
  if (tensor === undefined) throw new TypeError(`${name} is not stored as one tensor`);
  return tensor;
}

function addQuantizedProduct(piece: GraphPiece, storage: QuantizedStorage, input: string, output: string): void {
  const { bits, rows, width, values, scales } = storage;
  const attributes = { K: width, N: rows, bits, block_size: BLOCK_SIZE, accuracy_level: ACCURACY_LEVEL };
  const inputs = [input, piece.stored(values), piece.stored(scales)];
  piece.add(node('MatMulNBits', inputs, [output], attributes, MICROSOFT_DOMAIN));
}
