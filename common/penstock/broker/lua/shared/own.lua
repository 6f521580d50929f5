-- USES now stranger live
--
-- own(id): writes that the run is of this process's configuration and of the folder with this id. It answers the id.
-- elsewhere: whether the run's state is in another folder. An empty `folder` is one whose id is not known.
-- this_folder(): the id of this process's folder, or that of the run if this one's is not known.
-- held(): the answer while another holds the run: {held, until when a launcher does, and a trainer}, Unix milliseconds.
-- Needs: identity, lease, launcher, rollout_digest, agent_digest, reward_digest, digest (of a trainer), settings, folder, next_folder,
--   words, place.
local known_folder = redis.call('HGET', identity, 'folder') or ''
local elsewhere = folder ~= '' and known_folder ~= '' and folder ~= known_folder

local function this_folder()
  if folder ~= '' then return folder end
  if known_folder ~= '' then return known_folder end
  return next_folder
end

local function own(id)
  redis.call('HSET', identity, 'rollout', rollout_digest, 'agent', agent_digest, 'reward', reward_digest, 'trainer', digest)
  redis.call('HSET', identity, 'settings', settings, 'folder', id, 'words', words, 'place', place)
  return id
end

local function deadline(key)
  local left_ms = redis.call('PTTL', key)
  if left_ms < 0 then return 0 end
  return now() + left_ms
end

local function held()
  return {'held', deadline(launcher), deadline(lease)}
end
