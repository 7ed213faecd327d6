DECLARE
    change record;
BEGIN
    IF tg_event = 'sql_drop' THEN
        FOR change IN SELECT * FROM pg_event_trigger_dropped_objects() WHERE original AND NOT is_temporary LOOP
            RAISE LOG USING MESSAGE = concat_ws(' ', 'AUDIT:', tg_tag, change.object_type, change.object_identity);
        END LOOP;
    ELSE
        FOR change IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE schema_name IS DISTINCT FROM 'pg_temp' LOOP
            RAISE LOG USING MESSAGE = concat_ws(' ', 'AUDIT:', change.command_tag, change.object_type, change.object_identity);
        END LOOP;
    END IF;
END
