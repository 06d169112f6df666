/** The attention-shard process. */
import { makeRoomForTensors, runService } from '@lamina/runtime';
import { startAttentionShard } from './service.ts';

makeRoomForTensors();
await runService('attention-shard', 'KV blocks and the attention over them', startAttentionShard);
