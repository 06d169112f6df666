/** Real servers, clusters and references, models to test with. */

export type { ExportForm, ExportOptions } from './exporters/export-options.ts';
export { writeExport, writeGenaiExport } from './exporters/write-export.ts';
export { perplexity } from './perplexity.ts';
export { writeRandomCheckpoint } from './random-checkpoint.ts';
export { RANDOM_MODELS } from './random-models.ts';
export type { RandomCheckpointOptions } from './random-options.ts';
export { argmax, type GreedyResult, UncutReference } from './reference.ts';
export { StagedReference } from './reference-staged.ts';
