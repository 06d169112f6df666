/**
 * Owns a graph under construction: its nodes, and the initializers that they use.
 *
 * Invariants
 * 1. An initializer is added with its first use, so a piece holds the weights that it uses and no others.
 */
import {
  byteInitializer,
  externalInitializer,
  floatInitializer,
  int64Initializer,
  type OnnxNode,
  type OnnxTensor,
  zeroInitializer,
} from './onnx.ts';
import type { StoredTensor, Weight } from './weight.ts';

/** Nodes and initializers under construction. */
export class GraphPiece {
  readonly nodes: OnnxNode[] = [];
  readonly #initializers = new Map<string, OnnxTensor>();

  get initializers(): OnnxTensor[] {
    return [...this.#initializers.values()];
  }

  add(...nodes: readonly OnnxNode[]): void {
    this.nodes.push(...nodes);
  }

  /** Name of a plain weight (float32), which becomes an initializer of this graph. */
  weight(weight: Weight): string {
    this.#initializers.set(weight.name, weightInitializer(weight));
    return weight.name;
  }

  /** Name of a stored tensor, which becomes an initializer of this graph; of other dims if so asked. */
  stored(tensor: StoredTensor, name = tensor.name, dims = tensor.dims): string {
    this.#initializers.set(name, externalInitializer(name, tensor, dims));
    return name;
  }

  /** Name of a float32 constant. */
  scalar(name: string, value: number): string {
    this.#initializers.set(name, floatInitializer(name, value));
    return name;
  }

  /** Name of float32 zeros. */
  zeros(name: string, dims: readonly number[]): string {
    this.#initializers.set(name, zeroInitializer(name, dims));
    return name;
  }

  /** Name of a uint8 constant. */
  byte(name: string, value: number): string {
    this.#initializers.set(name, byteInitializer(name, value));
    return name;
  }

  /** Name of an integer constant; no dims given = a vector. */
  integers(name: string, values: readonly number[], dims: readonly number[] = [values.length]): string {
    this.#initializers.set(name, int64Initializer(name, values, dims));
    return name;
  }
}

/** A plain weight (float32) as an initializer. */
function weightInitializer({ name, role, storage }: Weight): OnnxTensor {
  if (role !== 'plain' || storage.kind !== 'dense') throw new TypeError(`${name} is no plain weight: see linear.ts`);
  return externalInitializer(name, storage.tensor, storage.tensor.dims);
}
