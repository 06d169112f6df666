/** Entry of the dense-executor process. */
import { makeRoomForTensors, runService } from '@lamina/runtime';
import { startDenseExecutor } from './service.ts';

makeRoomForTensors();
await runService('dense-executor', 'Dense stages, continuous batching and sampling', startDenseExecutor);
