/** Owns what the rows of scale attend to: how many requests, contexts and layers, and how their KV lies. */
import type { KvLayout } from '@lamina/tensor';
import { shapeOf } from './models.ts';

export const SCALE = { model: 'smollm2-135m', contextTokens: 8192, blockSizeTokens: 32, numRequests: 8 } as const;

export function scaleLayoutOf(numLayers: number): KvLayout {
  const { numHeads, numKvHeads, headDim } = shapeOf(SCALE.model).shape;
  const { blockSizeTokens } = SCALE;
  return { numLayers, numHeads, numKvHeads, headDim, scale: headDim ** -0.5, blockSizeTokens, kvDtype: 'f16' };
}
