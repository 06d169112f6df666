/**
 * Owns how a stored weight is used: products with matrices, products with tables (the LM head) and table lookups, as
 * the operators that the weight's storage needs. Nothing else knows how weights are stored.
 *
 * Invariants
 * 1. Inputs and outputs are float32 whatever the storage.
 * 2. What only depends on weights (casts, joins, transposes) is nodes on initializers of the same graph, which ONNX
 *    Runtime folds when it loads the graph: no step pays for it.
 * 3. A row of activations is rounded by its own largest value, and sums of integers are exact: what a token's products
 *    are does not depend on the tokens beside it.
 */
import type { GraphPiece } from './graph-piece.ts';
import { FLOAT32_TYPE, MICROSOFT_DOMAIN, node } from './onnx.ts';
import { BLOCK_SIZE, type BlockStorage, type IntegerStorage, type StoredTensor, type Weight } from './weight.ts';

/** Of a value in blocks. */
const BITS = 4;
/** MatMulNBits: activations are quantized to int8 too, per row and block. */
const ACCURACY_LEVEL = 4;

interface LinearContext {
  readonly piece: GraphPiece;
  readonly prefix: string;
}

/**
 * `input` [.., K] times `weight` [K, N] (+ `bias` [N]). Returns the name of the result, `prefix.label`.
 * @param isForeign Whether `input` was computed elsewhere: single values of a row may then be NaN, which here come by rows.
 */
export function addLinear(
  { piece, prefix }: LinearContext,
  label: string,
  input: string,
  weight: Weight,
  bias: Weight | null,
  isForeign = false,
): string {
  const output = `${prefix}.${label}`;
  const product = bias === null ? output : `${output}.product`;
  const { storage } = weight;
  if (storage.kind === 'blocks') addBlockProduct(piece, storage, input, product);
  else if (storage.kind === 'integers') {
    const rounded = addRounding(piece, storage, input, product, isForeign);
    addIntegerProduct(piece, storage, rounded, { first: 0, count: storage.rows, output: product });
  } else piece.add(node('MatMul', [input, denseMatrix(piece, weight)], [product]));
  if (bias !== null) piece.add(node('Add', [product, piece.weight(bias)], [output]));
  return output;
}

/** As addLinear, with the N columns of the result split into `outputs`. */
export function addSplitLinear(
  context: LinearContext,
  label: string,
  input: string,
  weight: Weight,
  bias: Weight | null,
  outputs: readonly { readonly name: string; readonly width: number }[],
): void {
  const { piece, prefix } = context;
  const { storage } = weight;
  if (storage.kind === 'integers' && bias === null) {
    // A product each: splitting what is computed would copy it.
    const rounded = addRounding(piece, storage, input, `${prefix}.${label}`);
    let first = 0;
    for (const { name, width } of outputs) {
      addIntegerProduct(piece, storage, rounded, { first, count: width, output: name });
      first += width;
    }
    return;
  }
  const joined = addLinear(context, label, input, weight, bias);
  const widths = outputs.map(({ width }) => width);
  const names = outputs.map(({ name }) => name);
  piece.add(node('Split', [joined, piece.integers(`${prefix}.${label}.widths`, widths)], names, { axis: -1 }));
}

/** Rows `indices` [..] of `table` [rows, width]: [.., width]. */
export function addLookup(piece: GraphPiece, table: Weight, indices: string, output: string): void {
  const { storage } = table;
  if (storage.kind === 'blocks') {
    const { rows, values, scales } = storage;
    const inputs = [piece.stored(values, `${values.name}.rows`, [rows, values.byteLength / rows]), indices];
    inputs.push(piece.stored(scales));
    const attributes = { gather_axis: 0, quantize_axis: 1, block_size: BLOCK_SIZE, bits: BITS };
    piece.add(node('GatherBlockQuantized', inputs, [output], attributes, MICROSOFT_DOMAIN));
    return;
  }
  if (storage.kind === 'integers') {
    const { rows, values, scales } = storage;
    const [gathered, cast, scale] = [`${output}.integers`, `${output}.unscaled`, `${output}.scales`];
    piece.add(node('Gather', [piece.stored(values), indices], [gathered]));
    piece.add(node('Cast', [gathered], [cast], { to: FLOAT32_TYPE }));
    piece.add(node('Gather', [piece.stored(scales, `${scales.name}.rows`, [rows, 1]), indices], [scale]));
    piece.add(node('Mul', [cast, scale], [output]));
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
  if (storage.kind === 'blocks') {
    addBlockProduct(piece, storage, input, output);
    return;
  }
  if (storage.kind === 'integers') {
    const rounded = addRounding(piece, storage, input, output);
    addIntegerProduct(piece, storage, rounded, { first: 0, count: storage.rows, output });
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

function addBlockProduct(piece: GraphPiece, storage: BlockStorage, input: string, output: string): void {
  const { rows, width, values, scales } = storage;
  const attributes = { K: width, N: rows, bits: BITS, block_size: BLOCK_SIZE, accuracy_level: ACCURACY_LEVEL };
  const inputs = [input, piece.stored(values), piece.stored(scales)];
  piece.add(node('MatMulNBits', inputs, [output], attributes, MICROSOFT_DOMAIN));
}

/** Activations as integers: value = (integers - zeroPoint) * step * largest. */
interface RoundedActivations {
  /** uint8, like the activations. */
  readonly integers: string;
  readonly zeroPoint: string;
  readonly step: string;
  /** [.., 1] the largest magnitude of each row. */
  readonly largest: string;
}

/**
 * Rounds each row to ActivationBits by its largest magnitude, to unsigned bytes about a zero point: the form that x86 has
 * integer matrix instructions for. A row that is not finite becomes NaN: ReduceMax passes over single NaN, so `probe` =
 * 0 . x has a say in `largest` where there can be some.
 */
function addRounding(
  piece: GraphPiece,
  { width, activationBits }: IntegerStorage,
  input: string,
  prefix: string,
  isForeign = false,
): RoundedActivations {
  const name = (label: string): string => `${prefix}.${label}`;
  const middle = 2 ** (activationBits - 1);
  const step = piece.scalar('activation_step', 1 / (middle - 1));
  const zeroPoint = piece.byte('activation_zero_point', middle);
  const found = isForeign ? name('finite_largest') : name('largest');
  piece.add(
    node('Abs', [input], [name('magnitudes')]),
    node('ReduceMax', [name('magnitudes')], [found], { axes: { ints: [-1] }, keepdims: 1 }),
  );
  if (isForeign) {
    piece.add(
      node('MatMul', [input, piece.zeros(`zeros_${width}`, [width, 1])], [name('probe')]),
      node('Max', [found, name('probe')], [name('largest')]),
    );
  }
  piece.add(
    node('Div', [input, name('largest')], [name('fractions')]),
    node('QuantizeLinear', [name('fractions'), step, zeroPoint], [name('rounded')]),
  );
  return { integers: name('rounded'), zeroPoint, step, largest: name('largest') };
}

/** Rows [first, first + count) of the stored matrix times rounded activations: the sum in int32, then the scales of both. */
function addIntegerProduct(
  piece: GraphPiece,
  { rows, values, scales }: IntegerStorage,
  { integers, zeroPoint, step, largest }: RoundedActivations,
  { first, count, output }: { readonly first: number; readonly count: number; readonly output: string },
): void {
  const rowsOf = (stored: StoredTensor): string => {
    const whole = piece.stored(stored);
    if (count === rows) return whole;
    const [begin, end] = [
      piece.integers(`first_${first}`, [first]),
      piece.integers(`end_${first + count}`, [first + count]),
    ];
    piece.add(node('Slice', [whole, begin, end, piece.integers('first_axis', [0])], [`${output}.${stored.name}`]));
    return `${output}.${stored.name}`;
  };
  const [columns, unscaled] = [`${output}.columns`, `${output}.unscaled`];
  piece.add(
    node('Transpose', [rowsOf(values)], [columns], { perm: { ints: [1, 0] } }),
    node(
      'MatMulIntegerToFloat',
      [integers, columns, step, rowsOf(scales), zeroPoint],
      [unscaled],
      {},
      MICROSOFT_DOMAIN,
    ),
    node('Mul', [unscaled, largest], [output]),
  );
}
