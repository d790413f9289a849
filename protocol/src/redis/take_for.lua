-- KEYS: stream, hash of what is known of its entries
-- ARGV: group, consumer, lease, most entries, patience, grace (empty: none), how many requests have their worker here already,
-- these requests, then pairs of processors and memory: free, whole, and one for every other spawner
local stream, known, group = KEYS[1], KEYS[2], ARGV[1]
local lease, patience, grace = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local free = 8 + tonumber(ARGV[7])
local whole, others, ours = free + 2, free + 4, {}
for i = 8, free - 1 do ours[ARGV[i]] = true end

-- The message of an entry. Twice is none, and is put aside as it is.
local function message(entry)
    local data
    for i = 1, #entry[2], 2 do
        if entry[2][i] == 'data' then data = data and data .. '\n' .. entry[2][i + 1] or entry[2][i + 1] end
    end
    return data or ''
end

local function about(entry)
    local project, request, cpu, memory = '', '', 0, 0
    local read, job = pcall(cjson.decode, message(entry))
    if read and type(job) == 'table' and type(job.limits) == 'table' and type(job.project_id) == 'string' then
        project = string.gsub(job.project_id, '\n', ' ')
        request = type(job.request_id) == 'string' and job.request_id or ''
        cpu = math.ceil((tonumber(job.limits.cpu) or 0) * 1000)
        memory = tonumber(job.limits.memory_mb) or 0
    end
    local text = string.format('%.0f %.0f ', cpu, memory) .. project .. '\n' .. request
    redis.call('HSET', known, entry[1], text)
    return text
end

local function fits(job, i)
    return job.cpu <= tonumber(ARGV[i]) and job.memory <= tonumber(ARGV[i + 1])
end

repeat
    local page = redis.call('XREADGROUP', 'GROUP', group, 'nobody', 'COUNT', 64, 'STREAMS', stream, '>')
    local new = page and page[1][2] or {}
    for _, entry in ipairs(new) do
        redis.call('XCLAIM', stream, group, 'nobody', 0, entry[1], 'IDLE', lease + 1, 'RETRYCOUNT', 0, 'JUSTID')
        about(entry)
    end
until #new < 64

local pending = redis.call('XPENDING', stream, group, '-', '+', ARGV[4])
if #pending == 0 then
    -- Of entries that somebody has deleted by hand, too.
    redis.call('DEL', known)
    return false
end
local ids = {}
for i, entry in ipairs(pending) do ids[i] = entry[1] end
local texts = redis.call('HMGET', known, unpack(ids))

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held, waiting = {}, {}
for place, entry in ipairs(pending) do
    local id, text = entry[1], texts[place]
    -- A former version did not note the request.
    if not text or not string.find(text, '\n', 1, true) then
        local found = redis.call('XRANGE', stream, id, id)[1]
        text = found and about(found)
        if not found then redis.call('XACK', stream, group, id) end
    end
    if text then
        local cpu, memory, project, request = string.match(text, '^(%S+) (%S+) ([^\n]*)\n(.*)$')
        if entry[3] < lease then
            held[project] = (held[project] or 0) + 1
        else
            waiting[#waiting + 1] = {
                id = id,
                place = place,
                project = project,
                request = request,
                cpu = tonumber(cpu),
                memory = tonumber(memory),
                age = now - tonumber(string.match(id, '^%d+')),
            }
        end
    end
end

local chosen
for _, job in ipairs(waiting) do
    if ours[job.request] and fits(job, whole) then
        chosen = job
        break
    end
end
for _, job in ipairs(chosen and {} or waiting) do
    if grace and job.age >= grace and not fits(job, whole) then
        local hope = false
        for i = others, #ARGV, 2 do hope = hope or fits(job, i) end
        if not hope then
            chosen = job
            break
        end
    end
end
if not chosen then
    table.sort(waiting, function(a, b)
        local one, other = held[a.project] or 0, held[b.project] or 0
        if one ~= other then return one < other end
        return a.place < b.place
    end)
    for _, job in ipairs(waiting) do
        if fits(job, whole) then
            if fits(job, free) then
                chosen = job
                break
            end
            -- It was passed over for too long: what is free is kept for it.
            if job.age >= patience then break end
        end
    end
end
if not chosen then return false end

local taken = redis.call('XCLAIM', stream, group, ARGV[2], 0, chosen.id)[1]
if not taken then
    -- Somebody has deleted it by hand.
    redis.call('XACK', stream, group, chosen.id)
    redis.call('HDEL', known, chosen.id)
    return false
end
return {chosen.id, message(taken), redis.call('XPENDING', stream, group, chosen.id, chosen.id, 1)[1][4]}
