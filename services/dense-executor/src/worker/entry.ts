/**
 * Owns the first step of a worker thread: ONNX Runtime's library is loaded before anything that needs it.
 *
 * Invariants
 * 1. The library is loaded inside the guard: its binding throws when its thread is ended meanwhile, which aborts the process.
 * 2. Nothing imported here imports it, else it would be loaded first.
 */
import { workerData } from 'node:worker_threads';
import type { WorkerOptions } from './messages.ts';
import { NativeGuard } from './native-guard.ts';

const { nativeGuard, workerIndex }: WorkerOptions = workerData;
const guard = new NativeGuard(nativeGuard, workerIndex);
guard.enterLoading();
await import('onnxruntime-node').finally(() => guard.leave());
await import('./main.ts');
