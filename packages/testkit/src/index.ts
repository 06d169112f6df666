/** Real servers, clusters and the uncut reference, for tests. */
export { type RandomCheckpointOptions, writeRandomCheckpoint } from './random-checkpoint.ts';
export { argmax, UncutReference } from './reference.ts';
export { StagedReference } from './reference-staged.ts';
