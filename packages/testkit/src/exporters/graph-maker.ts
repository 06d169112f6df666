/**
 * Owns making ONNX graphs with random weights for tests: nodes, constants, and linear layers in the precisions in which
 * decoders are published.
 *
 * Invariants
 * 1. The same calls give the same bytes.
 * 2. Quantized layers are in the form that the exporters' quantizers give them: MatMulNBits and MatMulBnb4 of ONNX
 *    Runtime, and DynamicQuantizeLinear + MatMulInteger + Cast + Mul of its dynamic quantization.
 */
import { encodeModelOf, type OnnxGraph, type OnnxNode, type OnnxTensor, type OpsetImport } from '@lamina/model';
import { float32ToFloat16Bits } from '@lamina/tensor';

/** How a decoder is published: model.onnx, model_fp16.onnx, model_q4.onnx, ... */
export type Precision = 'fp32' | 'fp16' | 'q4' | 'q4f16' | 'int8' | 'uint8' | 'bnb4';

/** ONNX's numbers of element types. */
export const ELEMENT = { float: 1, uint8: 2, int8: 3, int32: 6, int64: 7, bool: 9, float16: 10 } as const;

type Attribute =
  | number
  | string
  | { readonly float: number }
  | { readonly ints: readonly number[] }
  | { readonly tensor: OnnxTensor }
  | { readonly graph: OnnxGraph };

const BLOCK = 32;
/** NormalFloat4, quantile by quantile, as bitsandbytes has it. */
const NF4 = 1;

export class GraphMaker {
  readonly precision: Precision;
  readonly #nodes: OnnxNode[] = [];
  readonly #initializers: OnnxTensor[] = [];
  readonly #inputs: NonNullable<OnnxGraph['input']> = [];
  readonly #outputs: NonNullable<OnnxGraph['output']> = [];
  readonly #random: () => number;
  readonly #quantized = new Map<string, readonly [string, string, string]>();
  #numNames = 0;

  constructor(precision: Precision, seed: number) {
    this.precision = precision;
    this.#random = randomSource(seed);
  }

  /** Element type of activations. */
  get floatType(): number {
    return this.precision === 'fp16' || this.precision === 'q4f16' ? ELEMENT.float16 : ELEMENT.float;
  }

  input(name: string, type: number, dims: readonly (number | string)[]): string {
    this.#inputs.push(tensorInfo(name, type, dims));
    return name;
  }

  output(name: string, type: number, dims: readonly (number | string)[]): void {
    this.#outputs.push(tensorInfo(name, type, dims));
  }

  /** Adds a node and returns its first output. An output name that is not given is made up. */
  add(
    opType: string,
    inputs: readonly string[],
    attributes: Readonly<Record<string, Attribute>> = {},
    { domain = '', outputs = [this.name(opType)] }: { domain?: string; outputs?: readonly string[] } = {},
  ): string {
    this.#nodes.push({
      name: `/${opType}_${this.#numNames++}`,
      opType,
      domain,
      input: [...inputs],
      output: [...outputs],
      attribute: Object.entries(attributes).map(([name, value]) => attributeOf(name, value)),
    });
    return outputs[0] ?? '';
  }

  /** An operator of ONNX Runtime's own. */
  microsoft(
    opType: string,
    inputs: readonly string[],
    attributes: Readonly<Record<string, Attribute>> = {},
    outputs?: readonly string[],
  ): string {
    return this.add(
      opType,
      inputs,
      attributes,
      outputs === undefined ? { domain: 'com.microsoft' } : { domain: 'com.microsoft', outputs },
    );
  }

  name(label: string): string {
    return `/${label}_output_${this.#numNames++}`;
  }

  ints(values: readonly number[], dims: readonly number[] = [values.length]): string {
    const name = this.name('ints');
    const raw = new Uint8Array(BigInt64Array.from(values, BigInt).buffer);
    this.#initializers.push({ name, dataType: ELEMENT.int64, dims: [...dims], rawData: raw });
    return name;
  }

  /** A scalar of the activations' type, or another; in a Constant node, as exporters have them. */
  scalar(value: number, type = this.floatType): string {
    const tensor: OnnxTensor = { dataType: type, dims: [], rawData: bytesOf(type, [value]) };
    return this.add('Constant', [], { value: { tensor } });
  }

  tensor(name: string, type: number, dims: readonly number[], values: ArrayLike<number>): string {
    this.#initializers.push({ name, dataType: type, dims: [...dims], rawData: bytesOf(type, values) });
    return name;
  }

  /** A subgraph whose outputs are constants of the activations' type: a branch of If. */
  constantBranch(
    name: string,
    tables: Readonly<Record<string, { dims: readonly number[]; values: Float64Array }>>,
  ): OnnxGraph {
    const type = this.floatType;
    const entries = Object.entries(tables);
    return {
      name,
      node: entries.map(([output, { dims, values }]) => ({
        name: `/${name}/${output}/Constant`,
        opType: 'Constant',
        output: [output],
        attribute: [
          attributeOf('value', { tensor: { dataType: type, dims: [...dims], rawData: bytesOf(type, values) } }),
        ],
      })),
      output: entries.map(([output, { dims }]) => tensorInfo(output, type, dims)),
    };
  }

  /** Random weights around `center`, in the activations' type. */
  weight(name: string, dims: readonly number[], spread: number, center = 0): string {
    return this.tensor(name, this.floatType, dims, this.#values(dims, spread, center));
  }

  /** `x` [.., inputs] times a random matrix, in the precision of the graph. */
  linear(x: string, name: string, inputs: number, outputs: number): string {
    const { precision } = this;
    const spread = 4 / Math.sqrt(inputs);
    if (precision === 'fp32' || precision === 'fp16') {
      return this.add('MatMul', [x, this.weight(`${name}.weight`, [inputs, outputs], spread)]);
    }
    if (precision === 'q4' || precision === 'q4f16') return this.#blocks(x, name, inputs, outputs, spread);
    if (precision === 'bnb4') return this.#bnb4(x, name, inputs, outputs, spread);
    return this.#integers(x, name, inputs, outputs, spread);
  }

  /** MatMulNBits: blocks of 32, two values in a byte, zero point 8. */
  #blocks(x: string, name: string, inputs: number, outputs: number, spread: number): string {
    const blocks = Math.ceil(inputs / BLOCK);
    const packed = Uint8Array.from({ length: (outputs * blocks * BLOCK) / 2 }, () => Math.floor(this.#random() * 256));
    const scales = Float64Array.from({ length: outputs * blocks }, () => (spread / 16) * (0.5 + this.#random()));
    const weight = this.tensor(`${name}.weight_Q4`, ELEMENT.uint8, [outputs, blocks, BLOCK / 2], packed);
    const scale = this.tensor(`${name}.weight_scales`, this.floatType, [outputs * blocks], scales);
    const attributes = { K: inputs, N: outputs, bits: 4, block_size: BLOCK, accuracy_level: 0 };
    return this.microsoft('MatMulNBits', [x, weight, scale], attributes);
  }

  #bnb4(x: string, name: string, inputs: number, outputs: number, spread: number): string {
    const elements = inputs * outputs;
    const packed = Uint8Array.from({ length: Math.ceil(elements / 2) }, () => Math.floor(this.#random() * 256));
    const maxima = Float64Array.from({ length: Math.ceil(elements / 64) }, () => (spread / 2) * (0.5 + this.#random()));
    const weight = this.tensor(`${name}.weight_Bnb4`, ELEMENT.uint8, [packed.length], packed);
    const absmax = this.tensor(`${name}.weight_absmax`, ELEMENT.float, [maxima.length], maxima);
    const attributes = { K: inputs, N: outputs, block_size: 64, quant_type: NF4, training_mode: 0 };
    return this.microsoft('MatMulBnb4', [x, weight, absmax], attributes);
  }

  /** Dynamic quantization: one scale for the whole of `x`, per step. */
  #integers(x: string, name: string, inputs: number, outputs: number, spread: number): string {
    const isSigned = this.precision === 'int8';
    const values = Int32Array.from(
      { length: inputs * outputs },
      () => Math.floor(this.#random() * 256) - (isSigned ? 128 : 0),
    );
    const weight = this.tensor(
      `${name}.weight_quantized`,
      isSigned ? ELEMENT.int8 : ELEMENT.uint8,
      [inputs, outputs],
      values,
    );
    const scale = this.tensor(`${name}.weight_scale`, ELEMENT.float, [], [spread / 256]);
    const zero = this.tensor(
      `${name}.weight_zero_point`,
      isSigned ? ELEMENT.int8 : ELEMENT.uint8,
      [],
      [isSigned ? 0 : 128],
    );
    const known = this.#quantized.get(x);
    const outs = known ?? ([this.name('quantized'), this.name('scale'), this.name('zero_point')] as const);
    if (known === undefined) {
      this.add('DynamicQuantizeLinear', [x], {}, { outputs: outs });
      this.#quantized.set(x, outs);
    }
    const [quantized, xScale, xZero] = outs;
    const product = this.add('MatMulInteger', [quantized, weight, xZero, zero]);
    const cast = this.add('Cast', [product], { to: ELEMENT.float });
    return this.add('Mul', [cast, this.add('Mul', [xScale, scale])]);
  }

  #values(dims: readonly number[], spread: number, center: number): Float32Array {
    const length = dims.reduce((a, b) => a * b, 1);
    return Float32Array.from({ length }, () => (this.#random() - 0.5) * spread + center);
  }

  graph(): OnnxGraph {
    return {
      name: 'main_graph',
      node: this.#nodes,
      initializer: this.#initializers,
      input: this.#inputs,
      output: this.#outputs,
    };
  }

  encode(irVersion: number, opsets: readonly OpsetImport[]): Uint8Array {
    return encodeModelOf(this.graph(), irVersion, opsets);
  }
}

function tensorInfo(
  name: string,
  elemType: number,
  dims: readonly (number | string)[],
): NonNullable<OnnxGraph['input']>[number] {
  const dim = dims.map((size) => (typeof size === 'string' ? { dimParam: size } : { dimValue: size }));
  return { name, type: { tensorType: { elemType, shape: { dim } } } };
}

/** Numbers of AttributeProto.AttributeType. */
const ATTRIBUTE = { float: 1, int: 2, string: 3, tensor: 4, graph: 5, ints: 7 } as const;

function attributeOf(name: string, value: Attribute): NonNullable<OnnxNode['attribute']>[number] {
  if (typeof value === 'number') return { name, type: ATTRIBUTE.int, i: value };
  if (typeof value === 'string') return { name, type: ATTRIBUTE.string, s: new TextEncoder().encode(value) };
  if ('float' in value) return { name, type: ATTRIBUTE.float, f: value.float };
  if ('ints' in value) return { name, type: ATTRIBUTE.ints, ints: [...value.ints] };
  if ('graph' in value) return { name, type: ATTRIBUTE.graph, g: value.graph };
  return { name, type: ATTRIBUTE.tensor, t: value.tensor };
}

function bytesOf(type: number, values: ArrayLike<number>): Uint8Array {
  if (type === ELEMENT.float) return new Uint8Array(Float32Array.from(values).buffer);
  if (type === ELEMENT.float16) return new Uint8Array(Uint16Array.from(values, float32ToFloat16Bits).buffer);
  if (type === ELEMENT.int64) return new Uint8Array(BigInt64Array.from(Array.from(values), BigInt).buffer);
  if (type === ELEMENT.int32) return new Uint8Array(Int32Array.from(values).buffer);
  return Uint8Array.from(values);
}

function randomSource(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d);
    mixed = Math.imul(mixed ^ (mixed >>> 12), 0x297a2d39);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 4294967296;
  };
}
