/** Entry of the dense-executor process. */
import { runService } from '@lamina/runtime';
import { startDenseExecutor } from './service.ts';

await runService('dense-executor', 'Dense stages, continuous batching and sampling', startDenseExecutor);
